"""LAMBADA's task on the held-out sequences of a run's own data: predict the last word of a passage.

A score that a model of any family and any size can begin to have, where the published tasks are still at nothing.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from cola_megatron.data import TokenShards, held_out_samples, read_tokenizer
from cola_megatron.evaluation.decoding import Decoding
from cola_megatron.evaluation.errors import EvaluationError
from cola_megatron.evaluation.harness import answers
from cola_megatron.evaluation.items import Item
from cola_megatron.evaluation.likelihood import from_all_replicas, own_part, progress_bar
from cola_megatron.evaluation.model import GeneratorModel
from cola_megatron.evaluation.passages import NEW_TOKENS, Passage, PassageRule, Piece, passages, pieces
from cola_megatron.evaluation.records import as_stored
from cola_megatron.evaluation.results import percentages
from cola_megatron.evaluation.scoring import match_first_word, normalize
from cola_megatron.evaluation.statistics import Figure, clustered_interval, clustered_standard_error
from cola_megatron.evaluation.token_counts import beginning
from cola_megatron.evaluation.word_guesses import Counts, count, guesses
from cola_megatron.parallel import ProcessGroups

GUESSERS = {
    "most_frequent_word": "the most frequent word of the training text",
    "most_frequent_of_context": "the most frequent word of the passage",
    "bigram": "the most frequent word after the one before",
}
"""In words, for tables."""


@dataclass(frozen=True)
class LastWords:
    """What a model made of the passages, and what guesses by counting would have made of them."""

    model: str
    data: str
    settings: dict[str, Any]
    records: list[dict[str, Any]]
    """By item: `id`, `sequence`, `context`, `target`, `generation`, `answer`, `correct`, and `guesses` by their names:
    the `answer` of each and whether it is `correct`."""

    @property
    def accuracy(self) -> Figure:
        """Share of the items that the model got right, 0 .. 1; error and interval are over sequences."""
        return self._share([record["correct"] for record in self.records])

    @property
    def baselines(self) -> dict[str, Figure]:
        """The same of every guesser, by its name."""
        names = [name for name in GUESSERS if name in self.records[0]["guesses"]]
        return {name: self._share([each["guesses"][name]["correct"] for each in self.records]) for name in names}

    @property
    def sequences(self) -> int:
        """How many held-out sequences the items come from."""
        return len({record["sequence"] for record in self.records})

    def as_json(self) -> dict[str, Any]:
        """The figures, without the items."""
        return {
            "task": "last_word",
            "model": self.model,
            "data": self.data,
            "settings": self.settings,
            "n": len(self.records),
            "correct": sum(record["correct"] for record in self.records),
            "sequences": self.sequences,
            "accuracy": self.accuracy.as_json(),
            "baselines": {name: figure.as_json() for name, figure in self.baselines.items()},
        }

    def rows(self) -> list[list[str]]:
        """A table in percent, headings first."""
        figures = {"the model": self.accuracy} | {GUESSERS[name]: each for name, each in self.baselines.items()}
        return [
            ["last word", "accuracy", "95% interval"],
            *([words, *percentages(figure.interval)] for words, figure in figures.items()),
        ]

    def _share(self, correct: list[bool]) -> Figure:
        by_sequence: dict[int, list[bool]] = {}
        for record, right in zip(self.records, correct, strict=True):
            by_sequence.setdefault(record["sequence"], []).append(right)
        right_ones, sizes = [sum(each) for each in by_sequence.values()], [len(each) for each in by_sequence.values()]
        return Figure(clustered_interval(right_ones, sizes), clustered_standard_error(right_ones, sizes))


@dataclass(frozen=True)
class LastWordTask:
    """The items, and what guesses by counting are made of."""

    data: str
    rule: PassageRule
    items: list[Passage]
    counts: Counts | None
    """None: the guesses that need counts are left out."""
    training_tokens: int
    """What was counted."""


def last_word_task(
    held_out: TokenShards,
    rule: PassageRule,
    limit: int | None = None,
    training: TokenShards | None = None,
    training_tokens: int = 2_000_000,
) -> LastWordTask:
    """The first passages of the held-out sequences, in the order in which these are measured.

    Args:
        limit: only the first items.
        training: the training split, of which words are counted: the first sequences of every source, by its size,
            `training_tokens` tokens in all; None: nothing is counted.

    Raises:
        EvaluationError: there is no item. UserError: the tokenizer cannot be read. ShardError: the data cannot be read.
    """
    tokenizer = read_tokenizer(held_out.tokenizer_path)
    sequences = (sample.tokens for sample in held_out_samples(held_out).read(0, len(held_out)))
    found = passages(sequences, tokenizer, held_out.end_of_text_id, held_out.padding_id, rule)
    items = list(islice(found, limit))
    if not items:
        raise EvaluationError(
            f"{held_out.folder}: no passage of {rule.context_tokens} tokens, or half as many, before a word of "
            f"at least {rule.letters} letters, in {len(held_out):,} "
            f"held-out sequences of {held_out.sequence_length} tokens: give fewer --context-tokens"
        )
    counts = None if training is None else count(_beginning(training, training_tokens), items, rule)
    counted = 0 if training is None else min(training_tokens, training.tokens)
    return LastWordTask(str(held_out.folder), rule, items, counts, counted)


def _beginning(shards: TokenShards, tokens: int) -> Iterator[Piece]:
    tokenizer = read_tokenizer(shards.tokenizer_path)
    for ids in beginning(shards, tokens):
        yield from pieces(ids, tokenizer, shards.end_of_text_id, shards.padding_id)


def evaluate_last_word(
    model: GeneratorModel, task: LastWordTask, groups: ProcessGroups, batch_size: int = 20, progress: bool = True
) -> LastWords | None:
    """Generates greedily and scores by LAMBADA's published rule, as `harness.evaluate_task` does.

    Returns:
        The result on the main process, None on the others. The items are shared out over replicas.

    Raises:
        UserError: the model cannot generate.
    """
    # A prompt that ends inside a block has the end of it in the first block that is written.
    decoding = Decoding(max_new_tokens=NEW_TOKENS + model.block_tokens - 1)
    own = own_part([Item(index, each.context, (each.target,)) for index, each in enumerate(task.items)], groups)
    records: dict[int | str, dict[str, Any]] = {}
    with progress_bar("last word", progress and groups.is_main) as bar:
        for record in answers(model, match_first_word, decoding, own, batch_size):
            records[record["id"]] = record
            bar(len(records), len(own))
    found = from_all_replicas([records[item.id] for item in own], groups)
    if not groups.is_main:
        return None
    settings = {
        **asdict(task.rule),
        "training_tokens": task.training_tokens,
        "decoding": asdict(decoding),
        "model": model.describe(),
    }
    whole = [_record(passage, answer, task) for passage, answer in zip(task.items, found, strict=True)]
    return LastWords(model.name, task.data, as_stored(settings), whole)


def _record(passage: Passage, answer: dict[str, Any], task: LastWordTask) -> dict[str, Any]:
    wanted = normalize(passage.target)
    guessed = guesses(passage, task.rule, task.counts)
    return {
        "id": answer["id"],
        **asdict(passage),
        **{name: answer[name] for name in ("generation", "answer", "correct")},
        "guesses": {name: {"answer": guess, "correct": guess == wanted} for name, guess in guessed.items()},
    }
