"""Runs of the autoregressive family: what they write, resuming bit for bit, every layout, from and to other folders."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cola_megatron.checkpoint.find import newest_checkpoint
from cola_megatron.checkpoint.load import read_weights
from cola_megatron.config import ConfigError, RunConfig, load_config
from cola_megatron.conversion.export_checkpoint import export_checkpoint
from cola_megatron.conversion.import_weights import import_weights
from cola_megatron.data import training_samples
from cola_megatron.data.run_shards import open_shards
from cola_megatron.families.autoregressive.chain import Autoregressive
from cola_megatron.interface import load_model
from cola_megatron.parallel import initialize_parallel, load_full_state_dict
from cola_megatron.records.metrics import read_metrics
from cola_megatron.training.batches import MicroBatches
from cola_megatron.training.loop import train
from tests.commands import cola
from tests.llama_folders import CASES, PROMPT, write_folder
from tests.ranks import run_ranks
from tests.test_layouts import FP32_CURVE, FP32_GRADIENT, steps_under_layout

SMALL = [
    "model.vocab_size=300",
    "model.transformer.num_layers=2",
    "model.transformer.hidden_size=32",
    "model.transformer.ffn_hidden_size=48",
    "model.transformer.num_key_value_heads=2",
    "data.sequence_length=32",
    "training.steps=6",
    "training.global_batch_size=8",
    "training.micro_batch_size=4",
    "training.loader_workers=0",
    "training.schedule.warmup_steps=2",
    "training.schedule.decay_steps=20",
    "training.evaluation.every=100",
    "training.evaluation.samples=8",
    "training.evaluation.texts=0",
    "training.checkpoint.every=100",
    "training.log.every=1",
    "training.log.wandb=disabled",
]
TENSOR, PIPELINE = "parallel.tensor_parallel_size", "parallel.pipeline_parallel_size"
SEQUENCE, CHUNKS = "parallel.sequence_parallel=true", "training.loss_chunk_tokens=48"
LAYOUTS = {
    "TP 2": (2, [f"{TENSOR}=2"]),
    "TP 2, sequence parallel, in chunks": (2, [f"{TENSOR}=2", SEQUENCE, CHUNKS]),
    "PP 2": (2, [f"{PIPELINE}=2"]),
    "TP 2 x PP 2": (4, [f"{TENSOR}=2", f"{PIPELINE}=2", SEQUENCE]),
    "PP 3, recomputed": (
        3,
        [f"{PIPELINE}=3", "parallel.pipeline_split=[2,1,1]", "training.activation_checkpointing=true"],
    ),
    "DP 2, ZeRO 3": (2, ["parallel.zero_stage=3", CHUNKS]),
}


@pytest.fixture
def small(corpus: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    def build(*overrides: str) -> RunConfig:
        paths = [f"data.path={corpus}", f"runs_folder={tmp_path / 'runs'}"]
        return load_config("tiny-autoregressive", [*SMALL, *paths, *overrides])

    return build


def run(config: RunConfig) -> dict[str, float]:
    return train(config, progress=False).metrics


def curve(config: RunConfig) -> list[tuple[float, float]]:
    records = [record for record in read_metrics(config.run_folder / "metrics.jsonl") if record["kind"] == "train"]
    return [(record["loss"], record["gradient_norm"]) for record in records]


def weights(config: RunConfig) -> dict[str, torch.Tensor]:
    return read_weights(newest_checkpoint(config.run_folder))[1]


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_a_run_learns_and_writes_what_it_measures(small):
    config = small("training.steps=40", "training.schedule.decay_steps=60", "training.evaluation.texts=2")
    metrics = run(config)
    losses = [loss for loss, _ in curve(config)]
    assert losses[0] == pytest.approx(math.log(300), abs=0.2) and losses[-1] < 0.8 * losses[0]
    assert metrics["nats_per_token"] < losses[0] and 0 < metrics["next_token_accuracy"] < 1
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["nats_per_token"]))
    (texts,) = [json.loads(line) for line in (config.run_folder / "texts.jsonl").read_text().splitlines()]
    assert texts["kind"] == "continuations" and len(texts["texts"]) == 2
    assert all(text["continuation"] and text["truth"] for text in texts["texts"])


@pytest.mark.parametrize("overrides", [[], ["training.precision=bf16", CHUNKS], ["data.document_attention=true"]])
def test_stop_and_resume_is_bit_identical(small, overrides):
    straight, halves = small("name=straight", *overrides), small("name=halves", *overrides)
    run(straight)
    run(small("name=halves", "training.stop_after=3", *overrides))
    run(halves)
    assert curve(halves) == curve(straight)
    assert_same(weights(halves), weights(straight))


@functools.cache
def one_process(*overrides: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
    return under_layout(1, list(overrides))


def under_layout(ranks: int, overrides: list[str]) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The metrics of four steps and the whole first moments after the first, which are its gradients."""
    config = load_config("tiny-autoregressive", [*SMALL, "training.micro_batch_size=2", *overrides])
    return steps_under_layout(config, ranks)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_every_gradient_equal_those_of_one_process(layout):
    ranks, overrides = LAYOUTS[layout]
    expected, gradients = one_process()
    metrics, found = under_layout(ranks, overrides)
    for mine, one in zip(metrics, expected, strict=True):
        assert mine["loss"] == pytest.approx(one["loss"], rel=FP32_CURVE)
    assert metrics[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-6)
    assert metrics[0]["gradient_norm"] == pytest.approx(expected[0]["gradient_norm"], rel=1e-5)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() <= FP32_GRADIENT * gradient.norm(), name


@pytest.mark.parametrize("layout", ["TP 2 x PP 2", "DP 2, ZeRO 3"])
def test_a_run_is_trained_measured_and_resumed_alike_in_any_layout(small, layout):
    overrides = ["training.steps=4", "training.evaluation.samples=23", "training.evaluation.texts=2"]
    ranks, parallel = LAYOUTS[layout]
    alone, together = small("name=alone", *overrides), small("name=together", *overrides, *parallel)
    expected = run(alone)
    run_ranks(run, ranks, small("name=together", "training.stop_after=2", *overrides, *parallel))
    for found in run_ranks(run, ranks, together):
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-3), name
    texts = [
        json.loads((config.run_folder / "texts.jsonl").read_text().splitlines()[-1])["texts"]
        for config in (alone, together)
    ]
    assert texts[0] == texts[1]
    for name, value in weights(alone).items():
        torch.testing.assert_close(weights(together)[name], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"{TENSOR}=4", "model.transformer.num_key_value_heads=2 must be divisible by"),
        ("model.transformer.num_key_value_heads=3", "model.transformer.num_attention_heads=4 must be divisible by"),
        ("model.vae.latent_dim=4", "model.vae"),
        ("objective.vae.beta=1", "objective"),
        ("training.vae_update.mode=frozen", "training.vae_update"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_in_one_line(override, message):
    with pytest.raises(ConfigError) as refusal:
        load_config("tiny-autoregressive", [*SMALL, override])
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_sequence_parallelism_must_divide_the_sequence():
    with pytest.raises(ConfigError, match=r"data\.sequence_length=33 must be divisible by .*sequence_parallel"):
        load_config("tiny-autoregressive", [*SMALL, f"{TENSOR}=2", SEQUENCE, "data.sequence_length=33"])


def test_a_run_is_loaded_and_exported_for_other_programs(small, tmp_path):
    config = small("training.steps=2")
    run(config)
    model = load_model(config.run_folder, device="cpu")
    (text,) = model.generate(["the prior"], max_new_tokens=5)
    assert text.text and len(text.token_ids) == 5
    (empty,) = model.generate([""], max_new_tokens=5)
    assert empty.prompt_tokens == 0 and len(empty.token_ids) == 5
    ids = model.tokenizer.encode("the prior writes latent blocks").ids
    both, first, last = model.log_likelihood([ids[1:], ids[1:3], ids[3:]], [ids[:1], ids[:1], ids[:3]])
    assert both.log_likelihood == pytest.approx(first.log_likelihood + last.log_likelihood, rel=1e-5)
    with pytest.raises(ValueError, match="steps is no setting of a likelihood that is exact; there are none"):
        model.log_likelihood([ids], steps=4)
    export_checkpoint(config.run_folder, tmp_path / "exported", progress=False)
    again = load_model(tmp_path / "exported", device="cpu")
    assert torch.equal(again.logits(PROMPT), model.logits(PROMPT))
    written = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert written["max_position_embeddings"] == 32
    assert written["eos_token_id"] == model.tokenizer.token_to_id("<|endoftext|>")


def test_perplexity_is_that_of_transformers(small, tmp_path):
    """Of `cola eval likelihood` on an export; there from a mean cross-entropy behind the token that ends documents."""
    pytest.importorskip("transformers")
    from transformers import AutoTokenizer, LlamaForCausalLM

    config = small("training.steps=4")
    run(config)
    folder, file = tmp_path / "llama", tmp_path / "texts.jsonl"
    export_checkpoint(config.run_folder, folder, progress=False)
    texts = ["the prior writes latent blocks of noise", "meaning", "words flow back: 7 of 12"]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    shown = cola("eval", "likelihood", folder, "--file", file, "--json")
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    theirs, tokenizer = LlamaForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    nats, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([[theirs.config.eos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]])
        with torch.no_grad():
            nats += theirs(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert found["tokens"] == tokens and found["nats_per_token"]["kind"] == "exact"
    assert found["nats_per_token"]["value"] == pytest.approx(nats / tokens, rel=1e-6)
    assert found["perplexity"]["value"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_an_import_is_exported_as_it_was(tmp_path):
    write_folder(tmp_path / "llama", CASES["grouped queries"], torch.bfloat16)
    import_weights(tmp_path / "llama", tmp_path / "imported", "tiny-autoregressive", SMALL, progress=False)
    export_checkpoint(tmp_path / "imported", tmp_path / "exported", progress=False)
    assert_same(*(load_file(tmp_path / name / "model.safetensors") for name in ("exported", "llama")))
    for name in ("llama", "exported"):
        assert torch.equal(load_model(tmp_path / name).logits(PROMPT), load_model(tmp_path / "imported").logits(PROMPT))
    with pytest.raises(ConfigError, match=r"model\.family=cola"):
        import_weights(tmp_path / "llama", tmp_path / "other", "tiny", [], progress=False)


def test_training_goes_on_from_imported_weights(small, tmp_path):
    config = small("name=first")
    run(config)
    export_checkpoint(config.run_folder, tmp_path / "exported", progress=False)
    import_weights(tmp_path / "exported", tmp_path / "imported", "tiny-autoregressive", SMALL, progress=False)
    second = small("name=second", "training.steps=2", f"training.start_from={tmp_path / 'imported'}")
    run(second)
    assert json.loads((second.run_folder / "start.json").read_text())["step"] == 0
    model = Autoregressive(config, initialize_parallel())
    load_full_state_dict(model, weights(config), model.groups)
    shards = open_shards(config, config.data.path, ["train"], model.groups)[0]
    batches = MicroBatches(config, training_samples(shards, config.data.seed), replica=0, replicas=1)
    losses = [model(batches[index].tensors)["loss"].item() for index in range(batches.per_step)]
    assert curve(second)[0][0] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
