"""Held-out texts that a model writes during training: the definition's, in every layout, unseen by training."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from cola_megatron.config import RunConfig
from cola_megatron.data.run_shards import open_shards
from cola_megatron.families.cola.texts import SETTINGS, STRIP_STEPS
from cola_megatron.families.texts import Continuation, Reconstruction, marked
from cola_megatron.held_out.texts import held_out_texts
from cola_megatron.inference.guided_sampling import sample_text
from cola_megatron.models.compiled_blocks import compile_blocks
from cola_megatron.parallel import initialize_parameters, marks_of
from cola_megatron.records.metrics import read_metrics
from cola_megatron.records.texts import TEXTS, readable_texts
from cola_megatron.training.build_model import build_model, initialize_run
from cola_megatron.training.engine import Engine
from cola_megatron.training.loop import train
from tests.ranks import run_ranks
from tests.test_layouts import LAYOUTS, shaken

COUNT = 3
ON = f"training.evaluation.texts={COUNT}"


def built(config: RunConfig):
    """Engine and held-out shards of this rank; every gate is open."""
    groups = initialize_run(config)
    (shards,) = open_shards(config, config.data.path, ["held_out"], groups)
    model = build_model(config, groups)
    for parameter in model.parameters():
        marks = marks_of(parameter)
        parameter.marks = replace(marks, initializer=shaken(marks.initializer))
    initialize_parameters(model, config.seed, groups)
    return Engine(model, config, groups), shards


def written(config: RunConfig) -> list[Continuation | Reconstruction]:
    engine, shards = built(config)
    state = torch.get_rng_state()
    texts = held_out_texts(engine.model, shards, config, COUNT)
    assert torch.equal(state, torch.get_rng_state())
    assert engine.model.training
    return list(texts)


def written_and_defined(config: RunConfig):
    engine, shards = built(config)
    texts, model = held_out_texts(engine.model, shards, config, COUNT), engine.model
    settings = replace(SETTINGS, max_new_tokens=len(texts[0].found))
    defined = [sample_text(model.vae, model.dit, text.prompt, settings, place) for place, text in enumerate(texts)]
    return texts, [tokens for tokens, _ in defined]


SMALL_BLOCKS = ("training.precision=fp32", "model.dit.block_size=4", "data.document_attention=false")


def test_a_continuation_is_that_of_the_definition(tiny):
    ((texts, defined),) = run_ranks(written_and_defined, 1, tiny(2, *SMALL_BLOCKS))
    assert len(texts) == COUNT
    for text, tokens in zip(texts, defined, strict=True):
        assert text.found == tokens
        assert len(text.found) == len(text.truth) == 16
        assert [time for time, _ in text.strip] == [1 - step / SETTINGS.steps for step in STRIP_STEPS]
        assert text.strip[-1][1] == text.found[: len(text.strip[-1][1])]
    assert len({tuple(text.prompt) for text in texts}) == len({tuple(text.found) for text in texts}) == COUNT


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("layout", ["TP 2, sequence parallel", "PP 2", "TP 2 x PP 2", "DP 2, ZeRO 3"])
def test_every_layout_writes_the_same_on_every_rank(tiny, layout, stage):
    ranks, overrides = LAYOUTS[layout]
    (alone,) = run_ranks(written, 1, tiny(stage, *SMALL_BLOCKS))
    assert run_ranks(written, ranks, tiny(stage, *SMALL_BLOCKS, *overrides)) == [alone] * ranks


def test_what_is_wrong_in_reconstructions_is_what_was_measured(tiny):
    config = tiny(1, ON, f"training.evaluation.samples={COUNT}", "data.document_attention=true")
    measured = train(config, progress=False).metrics["reconstruction_accuracy"]
    (record,), damaged = readable_texts(config.run_folder)
    assert (record["kind"], record["step"], damaged) == ("reconstructions", 6, [])
    tokens, wrong = (sum(text[name] for text in record["texts"]) for name in ("tokens", "wrong"))
    assert 1 - wrong / tokens == pytest.approx(measured, abs=1e-9)
    for text in record["texts"]:
        assert any(not right for _, right in text["reconstruction"])
        assert [right for _, right in text["original"]] == [right for _, right in text["reconstruction"]]


def curve(config: RunConfig) -> list[tuple]:
    records = read_metrics(config.run_folder / "metrics.jsonl")
    return [(each["step"], each["loss"], each["gradient_norm"]) for each in records if each["kind"] == "train"]


def run(config: RunConfig) -> None:
    train(config, progress=False)


@pytest.mark.parametrize("layout", [pytest.param("DP 2, ZeRO 3", marks=pytest.mark.slow), "PP 2"])
def test_training_does_not_notice(tiny, layout):
    ranks, overrides = LAYOUTS[layout]
    common = ("training.evaluation.every=3", "training.precision=bf16", *overrides)
    without, with_texts = tiny(2, "name=without", *common), tiny(2, "name=with", ON, *common)
    for config in (without, with_texts):
        run_ranks(run, ranks, config)
    assert curve(with_texts) == curve(without)
    assert not (without.run_folder / TEXTS).exists()
    assert [record["step"] for record in readable_texts(with_texts.run_folder)[0]] == [3, 6]


def test_a_resumed_run_writes_what_one_that_was_not_stopped_does(tiny):
    every = (ON, "training.evaluation.every=2", "training.checkpoint.every=3")
    whole, stopped = tiny(2, "name=whole", *every), tiny(2, "name=stopped", *every)
    train(whole, progress=False)
    train(stopped.model_copy(update={"training": stopped.training.model_copy(update={"stop_after": 4})}), False)
    later = json.dumps({"kind": "continuations", "step": 5, "texts": []}) + "\n"
    with (stopped.run_folder / TEXTS).open("a") as file:
        file.write(later)
    train(stopped, progress=False)
    assert (stopped.run_folder / TEXTS).read_text() == (whole.run_folder / TEXTS).read_text()


def test_no_layer_is_compiled_for_lengths_that_training_does_not_have(tiny):
    config = tiny(2)
    groups = initialize_run(config)
    model, graphs = build_model(config, groups), CompileCounterWithBackend("eager")
    initialize_parameters(model, config.seed, groups)
    compile_blocks(model, graphs)
    (shards,) = open_shards(config, config.data.path, ["held_out"], groups)
    assert len(held_out_texts(model, shards, config, COUNT)) == COUNT
    assert graphs.frame_count == 0


def test_the_last_of_two_records_of_a_step_counts(tmp_path: Path):
    lines = [{"kind": "continuations", "step": step, "texts": [{"n": n}]} for n, step in enumerate((2, 4, 4))]
    (tmp_path / TEXTS).write_text("".join(json.dumps(line) + "\n" for line in lines) + "{damaged\n")
    records, damaged = readable_texts(tmp_path)
    assert [record["texts"][0]["n"] for record in records] == [0, 2] and damaged == [4]


def test_without_a_tokenizer_the_texts_are_token_ids(tiny, monkeypatch, caplog):
    monkeypatch.setattr("cola_megatron.training.loop.keep_tokenizer", lambda *arguments: None)
    config = tiny(1, ON)
    train(config, progress=False)
    (record,), _ = readable_texts(config.run_folder)
    words = "".join(piece for piece, _ in record["texts"][0]["original"]).split()
    assert len(words) == record["texts"][0]["tokens"] and all(word.isdigit() for word in words)
    assert "has no tokenizer: texts are written as token ids" in caplog.text


def test_marks_keep_characters_that_span_tokens():
    letters = b"a", "\u00e9".encode()[:1], "\u00e9".encode()[1:], b"b"

    def decode(tokens: list[int]) -> str:
        return b"".join(letters[token] for token in tokens).decode(errors="replace")

    assert marked(decode, [0, 1, 2, 3], [True, True, False, False]) == [("a", True), ("\u00e9b", False)]
    assert marked(decode, [0, 1], [True, False]) == [("a", True), ("\ufffd", False)]
    assert marked(decode, [], []) == []
