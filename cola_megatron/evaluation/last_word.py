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
from cola_megatron.evaluation.last_word_results import LastWords
from cola_megatron.evaluation.likelihood import from_all_replicas, own_part, progress_bar
from cola_megatron.evaluation.model import GeneratorModel
from cola_megatron.evaluation.passages import NEW_TOKENS, Passage, PassageRule, Piece, passages, pieces
from cola_megatron.evaluation.records import as_stored
from cola_megatron.evaluation.scoring import match_first_word, normalize
from cola_megatron.evaluation.token_counts import beginning
from cola_megatron.evaluation.word_guesses import Counts, count, guesses
from cola_megatron.parallel import ProcessGroups


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
        **{name: answer[name] for name in ("prompt_tokens", "generation", "answer", "correct") if name in answer},
        "guesses": {name: {"answer": guess, "correct": guess == wanted} for name, guess in guessed.items()},
    }
