"""`cola eval last-word`: which passages it asks about, what stands beside the model's score, and how sure it is."""

import json
from pathlib import Path

import numpy as np
import pytest

from cola_megatron.config import ConfigError
from cola_megatron.data import TokenShards, held_out_samples, read_tokenizer
from cola_megatron.data.manifest import ShardError
from cola_megatron.errors import UserError
from cola_megatron.evaluation.errors import EvaluationError
from cola_megatron.evaluation.last_word import evaluate_last_word, last_word_task
from cola_megatron.evaluation.model import GeneratorModel
from cola_megatron.evaluation.passages import NEW_TOKENS, Passage, PassageRule, Piece, pieces, words_of
from cola_megatron.evaluation.scoring import match_first_word
from cola_megatron.evaluation.statistics import clustered_interval, clustered_standard_error, wilson_interval
from cola_megatron.evaluation.word_guesses import count, guesses
from cola_megatron.inference.settings import CommonSettings
from cola_megatron.parallel import initialize_parallel
from cola_megatron.training.loop import train
from tests.support import make_text, prepared
from tests.test_cli import cola
from tests.test_families import PRESETS, small

RULE = PassageRule(context_tokens=16)


@pytest.fixture(scope="module")
def held_out(corpus: Path) -> TokenShards:
    return TokenShards(corpus, "held_out")


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of two steps for each family."""
    folder = tmp_path_factory.mktemp("runs")
    for name in PRESETS:
        train(small(name, corpus, folder, "training.steps=2", "training.evaluation.samples=4"), progress=False)
    return {name: folder / name for name in PRESETS}


class Oracle:
    """Has read the held-out passages: a model as the harness sees one, that is right about some of them."""

    name, block_tokens = "oracle", 1

    def __init__(self, known: list[Passage]):
        self.known = {passage.context: passage.target for passage in known}

    def describe(self):
        return {"family": "oracle", **vars(CommonSettings())}

    def generate(self, prompts, sample_ids, decoding, batch_size):
        assert decoding.temperature == 0
        return enumerate(f" {self.known.get(prompt, 'nothing').upper()}. More" for prompt in prompts)


# ---- passages -------------------------------------------------------------------------------------------------------


def test_a_passage_is_whole_words_of_one_sequence_and_the_next_begins_behind_it(held_out):
    tokenizer = read_tokenizer(held_out.tokenizer_path)
    found = last_word_task(held_out, RULE).items
    texts = [
        tokenizer.decode(sample.tokens.tolist(), skip_special_tokens=False)
        for sample in held_out_samples(held_out).read(0, len(held_out))
    ]
    assert len(found) > len({passage.sequence for passage in found}) > len(held_out) / 2
    beyond = dict.fromkeys(range(len(texts)), 0)
    for passage in found:
        text, whole = texts[passage.sequence], f"{passage.context} {passage.target}"
        place = text.index(whole, beyond[passage.sequence])
        beyond[passage.sequence] = place + len(whole)
        assert text[place - 1].isspace() or text[:place].endswith("<|endoftext|>")
        assert len(text) > beyond[passage.sequence] and not text[beyond[passage.sequence]].isalnum()
        assert passage.target.isalpha() and len(passage.target) >= 4
        tokens = len(tokenizer.encode(passage.context, add_special_tokens=False).ids)
        assert RULE.context_tokens / 2 - 3 <= tokens <= RULE.context_tokens
        assert len(tokenizer.encode(f" {passage.target}", add_special_tokens=False).ids) < NEW_TOKENS
    assert last_word_task(held_out, RULE, 5).items == found[:5]


def test_what_a_sequence_cuts_through_is_no_word():
    text = "ssage begins here, and ends in a hal"
    inside = [word.text for word in words_of(Piece(text, False, False), 4)]
    assert inside == ["begins", "here,", "and", "ends", "in", "a"]
    assert [word.text for word in words_of(Piece(text, True, True), 4)][:: len(inside) + 1] == ["ssage", "hal"]
    letters = {word.text: word.letters for word in words_of(Piece('(a "quoted" word), 1st x_y don\'t', True, True), 4)}
    assert letters["word),"] == "word"
    assert all(letters[other] is None for other in ("(a", '"quoted"', "1st", "x_y", "don't"))


def test_documents_of_a_sequence_are_apart_and_padding_is_none(held_out):
    tokenizer = read_tokenizer(held_out.tokenizer_path)
    ids = tokenizer.encode("one text", add_special_tokens=False).ids
    end, padding = held_out.end_of_text_id, held_out.padding_id
    found = pieces(np.array([*ids, end, *ids, end, *ids, padding, padding]), tokenizer, end, padding)
    assert found == [
        Piece("one text", False, True),
        Piece("one text", True, True),
        Piece("one text", True, True),
    ]
    assert pieces(np.array(ids), tokenizer, end, padding) == [Piece("one text", False, False)]
    assert pieces(np.array([padding] * 4), tokenizer, end, padding) == []


# ---- guesses and figures --------------------------------------------------------------------------------------------


def test_guesses_by_counting():
    training = [Piece("the model writes words and the model reads the words of a model", True, True)]
    passage = Passage(0, "where noise meets noise and latents, the latents are the", "model")
    asked = [passage, Passage(0, "nobody ever saw this", "model")]
    counts = count(training, asked, PassageRule())
    assert counts.words == {"model": 3, "writes": 1, "words": 2, "reads": 1}
    assert counts.after == {"the": {"model": 2, "words": 1}}  # "this" was never seen, "a" is not asked about
    found = guesses(passage, PassageRule(), counts)
    assert found == {"most_frequent_word": "model", "bigram": "model", "most_frequent_of_context": "latents"}
    assert guesses(asked[1], PassageRule(), counts)["bigram"] == "model"
    assert guesses(passage, PassageRule(), None) == {"most_frequent_of_context": "latents"}


def test_the_interval_knows_that_items_of_one_text_go_together():
    assert clustered_interval([1, 0, 1, 0], [1, 1, 1, 1]) == wilson_interval(2, 4)
    apart = clustered_interval([1, 1, 1, 1] * 5, [2] * 20)
    together = clustered_interval([2, 0, 2, 0] * 5, [2] * 20)
    one_each = wilson_interval(10, 20)
    assert apart.value == together.value == 0.5 and together.high - together.low > apart.high - apart.low
    assert (together.low, together.high) == (
        pytest.approx(one_each.low, abs=0.01),
        pytest.approx(one_each.high, abs=0.01),
    )
    none = clustered_interval([0] * 10, [3] * 10)
    assert none == wilson_interval(0, 10)  # as sure as the number of texts
    assert clustered_standard_error([2, 0] * 10, [2] * 20) == pytest.approx(0.5 / np.sqrt(19))
    assert clustered_standard_error([0] * 10, [3] * 10) == pytest.approx(np.sqrt(1 / 12 * 11 / 12 / 10))
    assert clustered_standard_error([2], [3]) == pytest.approx(np.sqrt(5 / 9 * 4 / 9))


def test_a_model_that_knows_half_scores_half(held_out, corpus):
    task = last_word_task(held_out, RULE, 40, TokenShards(corpus, "train"))
    found = task.items
    result = evaluate_last_word(Oracle(found[::2]), task, initialize_parallel(), progress=False)
    assert result.accuracy.interval.value == 0.5 and result.sequences == len({each.sequence for each in found})
    assert [record["correct"] for record in result.records] == [True, False] * 20
    first = result.records[0]
    assert (first["context"], first["target"]) == (found[0].context, found[0].target)
    assert match_first_word(first["generation"], first["target"]).correct
    assert set(result.baselines) == {"most_frequent_word", "most_frequent_of_context", "bigram"}
    for name, figure in result.baselines.items():
        right = [record["guesses"][name]["correct"] for record in result.records]
        assert figure.interval.value == sum(right) / 40 and figure.interval.low <= figure.interval.value
    uncounted = last_word_task(held_out, RULE, 40)
    alone = evaluate_last_word(Oracle(found), uncounted, initialize_parallel(), progress=False)
    assert alone.accuracy.interval.value == 1.0 and set(alone.baselines) == {"most_frequent_of_context"}


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_family_answers_the_same_items(runs, name, tmp_path, held_out):
    steps = [] if name == "autoregressive" else ["--steps", 2]
    command = ["eval", "last-word", runs[name], "--limit", 6, "--context-tokens", 16, *steps]
    output = tmp_path / "last_word.json"
    shown = json.loads(cola(*command, "--output", output, "--json"))
    document = json.loads(output.read_text())
    assert {key: value for key, value in document.items() if key != "items"} == shown
    asked = [(item["sequence"], item["context"], item["target"]) for item in document["items"]]
    assert asked == [(each.sequence, each.context, each.target) for each in last_word_task(held_out, RULE, 6).items]
    tokenizer = read_tokenizer(held_out.tokenizer_path)
    lengths = [len(tokenizer.encode(context, add_special_tokens=False).ids) for _, context, _ in asked]
    assert [item["prompt_tokens"] for item in document["items"]] == lengths
    assert shown["n"] == 6 and shown["sequences"] == len({sequence for sequence, _, _ in asked})
    assert shown["correct"] == sum(item["correct"] for item in document["items"])
    assert shown["accuracy"]["value"] == shown["correct"] / 6
    assert shown["accuracy"]["low"] <= shown["accuracy"]["value"] < shown["accuracy"]["high"] <= 1
    assert shown["settings"]["context_tokens"] == 16 and shown["settings"]["model"]["noise_seed"] == 66
    again = json.loads(cola(*command, "--json", "--batch-size", 2))
    assert again == shown
    if name == "autoregressive":
        table = cola(*command, "--training-tokens", 0)
        assert "6 items of" in table and "the model" in table and "after the one before" not in table


def test_a_failed_evaluation_leaves_no_file(runs, tmp_path, monkeypatch):
    def failing(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(GeneratorModel, "generate", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        cola("eval", "last-word", runs["plaid"], "--context-tokens", 16, "--output", tmp_path / "last_word.json")
    assert list(tmp_path.iterdir()) == []


def test_wrong_use(runs, corpus, tmp_path):
    run = runs["autoregressive"]
    with pytest.raises(EvaluationError, match="no passage of 96 tokens, or half as many, before a word of at least 4"):
        cola("eval", "last-word", run)
    with pytest.raises(ConfigError, match="guidance_scale is no setting of generation by"):
        cola("eval", "last-word", run, "--context-tokens", 16, "--guidance-scale", 2.0)
    with pytest.raises(UserError, match="is no run with data of its own: give --data FOLDER"):
        cola("eval", "last-word", Path(__file__).parent / "data" / "reference_tiny")
    with pytest.raises(ShardError, match="not a finished prepared folder"):
        cola("eval", "last-word", run, "--data", tmp_path)
    text = tmp_path / "other.jsonl"
    make_text(text, documents=40)
    other = prepared(tmp_path / "other", [text], vocab_size=280)
    with pytest.raises(UserError, match="was prepared with another tokenizer"):
        cola("eval", "last-word", run, "--data", other)
    whole = prepared(tmp_path / "whole", [text], held_out_fraction=0.0, tokenizer={"path": corpus / "tokenizer.json"})
    with pytest.raises(ShardError, match="held_out"):
        cola("eval", "last-word", run, "--data", whole)
    exported = tmp_path / "export"
    cola("convert", "export", run, exported)
    (exported / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"export has no tokenizer\.json, and passages are texts"):
        cola("eval", "last-word", exported, "--data", corpus)
