"""Runs of Plaid: they learn, resume bit for bit, and are the same in every layout."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cola_megatron.checkpoint.find import newest_checkpoint
from cola_megatron.checkpoint.load import read_weights
from cola_megatron.config import ConfigError, RunConfig, load_config
from cola_megatron.conversion.export_checkpoint import export_checkpoint
from cola_megatron.errors import UserError
from cola_megatron.families.plaid.measurement import PlaidMeasurement
from cola_megatron.families.plaid.plaid_lm import PlaidLM
from cola_megatron.interface import load_model
from cola_megatron.models.steps import run_steps
from cola_megatron.parallel import gather_state_dict
from cola_megatron.records.metrics import read_metrics
from cola_megatron.training.loop import train
from tests.ranks import run_ranks
from tests.support import random_batch
from tests.test_layouts import BF16, FP32_CURVE, FP32_GRADIENT, steps_under_layout
from tests.test_plaid import model_of

SMALL = [
    "model.vocab_size=300",
    "model.transformer.num_layers=2",
    "model.transformer.hidden_size=32",
    "model.transformer.ffn_hidden_size=48",
    "model.diffusion.embedding_dim=4",
    "model.diffusion.schedule_hidden_size=16",
    "objective.output_prior_warmup_steps=2",
    "objective.cut_share=0.2",
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
SEQUENCE, CHUNKS, UNTOLD = (
    "parallel.sequence_parallel=true",
    "training.loss_chunk_tokens=48",
    "objective.self_conditioning=0",
)
LAYOUTS = {
    "TP 2": (2, [f"{TENSOR}=2"]),
    "TP 2, sequence parallel, in chunks": (2, [f"{TENSOR}=2", SEQUENCE, CHUNKS]),
    "PP 2": (2, [f"{PIPELINE}=2", UNTOLD]),
    "TP 2 x PP 2": (4, [f"{TENSOR}=2", f"{PIPELINE}=2", SEQUENCE, UNTOLD]),
    "PP 3, recomputed": (
        3,
        [f"{PIPELINE}=3", "parallel.pipeline_split=[3,1,2]", "training.activation_checkpointing=true", UNTOLD],
    ),
    "DP 2, ZeRO 2": (2, ["parallel.zero_stage=2"]),
    # A micro-batch of one sample: some of them are told no first estimate, and their ranks must keep step.
    "DP 2, ZeRO 3, one by one": (2, ["parallel.zero_stage=3", CHUNKS, "training.micro_batch_size=1"]),
}


@pytest.fixture
def small(corpus: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    def build(*overrides: str) -> RunConfig:
        paths = [f"data.path={corpus}", f"runs_folder={tmp_path / 'runs'}"]
        return load_config("tiny-plaid", [*SMALL, *paths, *overrides])

    return build


def run(config: RunConfig) -> dict[str, float]:
    return train(config, progress=False).metrics


def curve(config: RunConfig) -> list[tuple[float, float]]:
    records = [record for record in read_metrics(config.run_folder / "metrics.jsonl") if record["kind"] == "train"]
    return [(record["loss"], record["gradient_norm"]) for record in records]


def weights(config: RunConfig) -> dict[str, torch.Tensor]:
    return read_weights(newest_checkpoint(config.run_folder))[1]


def test_a_run_learns_and_writes_what_it_measures(small):
    config = small("training.steps=60", "training.schedule.decay_steps=90", "training.evaluation.texts=2")
    metrics = run(config)
    losses = [loss for loss, _ in curve(config)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert metrics["nats_per_token"] < losses[0]
    terms = [metrics[f"{term}_nats_per_token"] for term in ("reconstruction", "prior", "diffusion")]
    assert metrics["nats_per_token"] == pytest.approx(sum(terms)) and metrics["nats_per_token_standard_error"] > 0
    (texts,) = [json.loads(line) for line in (config.run_folder / "texts.jsonl").read_text().splitlines()]
    assert texts["kind"] == "continuations" and len(texts["texts"]) == 2
    assert all(text["continuation"] and text["truth"] and len(text["strip"]) == 5 for text in texts["texts"])


@pytest.mark.parametrize("overrides", [[], ["training.precision=bf16", CHUNKS], ["data.document_attention=true"]])
def test_stop_and_resume_is_bit_identical(small, overrides):
    straight, halves = small("name=straight", *overrides), small("name=halves", *overrides)
    run(straight)
    run(small("name=halves", "training.stop_after=3", *overrides))
    run(halves)
    assert curve(halves) == curve(straight)
    first, second = weights(halves), weights(straight)
    assert first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@functools.cache
def one_process(*overrides: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
    return under_layout(1, list(overrides))


def under_layout(ranks: int, overrides: list[str]) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The metrics of four steps and the whole first moments after the first, which are its gradients."""
    config = load_config("tiny-plaid", [*SMALL, "training.micro_batch_size=2", *overrides])
    return steps_under_layout(config, ranks)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_every_gradient_equal_those_of_one_process(layout):
    ranks, overrides = LAYOUTS[layout]
    expected, gradients = one_process(*(override for override in overrides if override == UNTOLD))
    metrics, found = under_layout(ranks, overrides)
    for mine, one in zip(metrics, expected, strict=True):
        assert mine["loss"] == pytest.approx(one["loss"], rel=FP32_CURVE)
    assert metrics[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-6)
    assert metrics[0]["gradient_norm"] == pytest.approx(expected[0]["gradient_norm"], rel=1e-5)
    assert found.keys() == gradients.keys()
    # The schedule's shape is one function; see `tests.test_plaid.assert_same_gradients`.
    of_shape = math.hypot(*(float(each.norm()) for name, each in gradients.items() if "schedule" in name))
    for name, gradient in gradients.items():
        size = of_shape if "schedule" in name else float(gradient.norm())
        assert (found[name] - gradient).norm() <= FP32_GRADIENT * size, name


@pytest.mark.parametrize("layout", ["TP 2, sequence parallel, in chunks", "PP 2"])
def test_bf16_differs_by_rounding_alone(layout):
    ranks, overrides = LAYOUTS[layout]
    common = ["training.precision=bf16"]
    expected, _ = one_process(*common, *(override for override in overrides if override == UNTOLD))
    metrics, _ = under_layout(ranks, [*common, *overrides])
    for step, (mine, one) in enumerate(zip(metrics, expected, strict=True)):
        assert abs(mine["loss"] - one["loss"]) <= BF16 * (step + 1) * one["loss"], step


@pytest.mark.parametrize("layout", ["TP 2 x PP 2", "DP 2, ZeRO 3, one by one"])
def test_a_run_is_trained_measured_and_resumed_alike_in_any_layout(small, layout):
    overrides = ["training.steps=4", "training.evaluation.samples=23", "training.evaluation.texts=2"]
    ranks, parallel = LAYOUTS[layout]
    overrides += [override for override in parallel if override == UNTOLD]
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


def test_it_overfits_one_batch_down_to_its_entropy():
    """Two texts, of one word each: which of them it is, and nothing else, is left to say."""
    overrides = ["data.sequence_length=16", "model.diffusion.embedding_dim=16", "objective.cut_share=0"]
    config = load_config("tiny-plaid", [*SMALL, *overrides, "objective.output_prior_warmup_steps=0"])
    model, steps = model_of(config), 250
    rows = {"tokens": torch.tensor([[5], [250]]).expand(2, 16), "documents": torch.zeros(2, 16, dtype=torch.long)}
    rows |= {"counted": torch.ones(2, 16, dtype=torch.bool)}
    batch = {name: tensor.repeat(4, 1) for name, tensor in rows.items()}
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        loss = model({**random_batch(config, range(8 * step, 8 * step + 8), step), **batch})["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    measurement, draws = PlaidMeasurement(config), 256
    inputs = {name: tensor.repeat(draws // 2, 1) for name, tensor in rows.items()}
    inputs |= {name: torch.from_numpy(array) for name, array in measurement.fixed_draws(range(draws)).items()}
    with torch.no_grad():
        weight = {"weight": torch.ones(draws, dtype=torch.float64)}
        metrics = measurement.metrics(run_steps(measurement.steps(model), inputs | weight, keep=["sum_moments"]))
    error, entropy = metrics["nats_per_token_standard_error"], math.log(2) / 16
    assert entropy - 4 * error < metrics["nats_per_token"] < 0.2  # at first it is 5.7
    assert metrics["reconstruction_nats_per_token"] < 0.02
    for dtype in (torch.float32, torch.bfloat16):
        written = PlaidLM(config.model, gather_state_dict(model, model.groups), None, dtype=dtype)
        prompts: list[list[int]] = [*[[]] * 12, [5] * 6, [250] * 6]
        lengths = [16 - len(prompt) for prompt in prompts]
        found = written.generate(prompts, steps=32, max_new_tokens=lengths, score_temperature=1.0)
        whole = [prompt + each.token_ids.tolist() for prompt, each in zip(prompts, found, strict=True)]
        assert all(text in ([5] * 16, [250] * 16) for text in whole)
        assert len({text[0] for text in whole[:12]}) == 2  # each of them among twelve draws


def test_a_run_is_loaded_generates_and_is_not_exported(small, tmp_path):
    config = small("training.steps=2")
    run(config)
    model = load_model(config.run_folder, device="cpu")
    (text,) = model.generate(["the prior"], max_new_tokens=5, steps=4)
    assert len(text.token_ids) == 5 and text.finish_reason == "length"
    (likelihood,) = model.log_likelihood(["the prior writes"], samples=2)
    assert likelihood.elbo < 0 and likelihood.bits_per_byte > 0
    with pytest.raises(UserError) as refusal:
        export_checkpoint(config.run_folder, tmp_path / "exported", progress=False)
    assert "\n" not in str(refusal.value) and not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"{TENSOR}=3"], "model.transformer.num_attention_heads=4 must be divisible by"),
        ([f"{PIPELINE}=2"], "objective.self_conditioning=0.25 with parallel.pipeline_parallel_size=2"),
        (["model.vae.latent_dim=4"], "model.vae"),
        (["objective.self_conditioning=1.5"], "objective.self_conditioning"),
        (["model.diffusion.embedding_dim=1"], "model.diffusion.embedding_dim"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_in_one_line(overrides, message):
    with pytest.raises(ConfigError) as refusal:
        load_config("tiny-plaid", [*SMALL, *overrides])
    assert message in str(refusal.value) and "\n" not in str(refusal.value)
