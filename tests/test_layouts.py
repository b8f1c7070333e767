"""Every layout is the same model: losses, every gradient and the loss curve equal those of one process.

The gradients are read off AdamW: after its first step its first moment is (1 - beta_1) times the clipped gradient, so
that accumulation, reduction over replicas, sums over tensor-parallel ranks and clipping are all in it.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from cola_megatron.config import RunConfig, load_config
from tests.ranks import run_ranks
from tests.support import TINY, random_batch

STEPS = 4  # past the warm-up: every sum and every update has been there several times
LONG = 20
LONG_EVERY_DAY = [("PP 2", 2), ("DP 2, ZeRO 3", 2)]
FP32_GRADIENT = 1e-5  # of each tensor's norm: float32 sums in another order, a few units of 1e-7 each
FP32_CURVE = 1e-4
FP32_NORM = 1e-6  # a norm and its square root in float32: a few units of 6e-8
BF16 = 2.0**-8  # spacing of bfloat16 at 1
TENSOR, PIPELINE = "parallel.tensor_parallel_size", "parallel.pipeline_parallel_size"
# Two micro-batches in a step accumulate as four do; a tensor-parallel one is mostly collectives, whatever its size.
IN_TWO = "training.micro_batch_size=4"
LAYOUTS = {
    "TP 2": (2, [f"{TENSOR}=2", IN_TWO]),
    "TP 2, sequence parallel": (2, [f"{TENSOR}=2", "parallel.sequence_parallel=true", IN_TWO]),
    "PP 2": (2, [f"{PIPELINE}=2"]),
    "PP 2 without ZeRO": (2, [f"{PIPELINE}=2", "parallel.zero_stage=0"]),
    "PP 4": (4, [f"{PIPELINE}=4"]),
    "TP 2 x PP 2": (4, [f"{TENSOR}=2", f"{PIPELINE}=2", "parallel.sequence_parallel=true"]),
    "DP 2, ZeRO 0": (2, ["parallel.zero_stage=0"]),
    "DP 2, ZeRO 1": (2, ["parallel.zero_stage=1"]),
    "DP 2, ZeRO 2": (2, ["parallel.zero_stage=2"]),
    "DP 2, ZeRO 3": (2, ["parallel.zero_stage=3"]),
    "TP 2 x DP 2, ZeRO 1": (4, [f"{TENSOR}=2", "parallel.zero_stage=1"]),
    "TP 2 x DP 2, ZeRO 2": (4, [f"{TENSOR}=2", "parallel.zero_stage=2", "parallel.sequence_parallel=true"]),
    "TP 2 x PP 2 x DP 2": (8, [f"{TENSOR}=2", f"{PIPELINE}=2", "parallel.sequence_parallel=true"]),
    "DP 2, recomputed, on the host": (
        2,
        ["training.activation_checkpointing=true", "parallel.offload_optimizer=true", "parallel.zero_stage=2"],
    ),
    "PP 2, recomputed": (2, [f"{PIPELINE}=2", "training.activation_checkpointing=true"]),
}


def tiny_config(overrides: list[str]) -> RunConfig:
    common = ["training.micro_batch_size=2", f"training.steps={LONG}", "parallel.reduce_bucket_size=20000"]
    return load_config("tiny", [*TINY, *common, *overrides])


def train_steps(config: RunConfig, steps: int) -> dict[str, Any]:
    """Trains on random tokens; the metrics of every step, and this rank's pieces of the first moments after step 1."""
    from cola_megatron.checkpoint.pieces import trained_pieces
    from cola_megatron.parallel import initialize_parameters, marks_of
    from cola_megatron.training.build_model import build_model, initialize_run
    from cola_megatron.training.engine import Engine

    groups = initialize_run(config)
    model = build_model(config, groups)
    for parameter in model.parameters():
        marks = marks_of(parameter)
        parameter.marks = replace(marks, initializer=shaken(marks.initializer))
    initialize_parameters(model, config.seed, groups)
    engine, metrics, moments = Engine(model, config, groups), [], []

    def micro_batches(step: int) -> Iterator[dict[str, torch.Tensor]]:
        size, replicas = config.training.micro_batch_size, groups.data_parallel_size
        for index in range(engine.accumulation):
            start = step * config.training.global_batch_size
            start += (index * replicas + groups.data_parallel_rank) * size
            yield random_batch(config, range(start, start + size), step, config.data.document_attention)

    for step in range(steps):
        metrics.append(engine.step(micro_batches(step), step))
        if step == 0:
            moments = [
                piece._replace(values=piece.values.clone().numpy())
                for piece in trained_pieces(engine, 1)
                if piece.name.startswith("exp_avg/")
            ]
    return {"metrics": metrics, "moments": moments}


def steps_under_layout(config: RunConfig, ranks: int) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The metrics of four steps and the whole first moments after the first, which are its gradients."""
    answers = run_ranks(train_steps, ranks, config, 4)
    assert all(answer["metrics"] == answers[0]["metrics"] for answer in answers)
    whole: dict[str, torch.Tensor] = {}
    for answer in answers:
        for piece in answer["moments"]:
            box = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.values.shape, strict=True))
            whole.setdefault(piece.name, torch.full(piece.whole, torch.nan))[box] = torch.from_numpy(piece.values)
    return answers[0]["metrics"], whole


def shaken(initializer):
    """A start at which no gate is closed, so that every parameter has a gradient."""

    def start(whole: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return initializer(whole, generator).add_(0.05 * torch.randn(whole.shape, generator=generator))

    return start


def run_layout(ranks: int, overrides: list[str], steps: int = STEPS) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The metrics (the same on every rank) and the whole first moments after step 1."""
    answers = run_ranks(train_steps, ranks, tiny_config(overrides), steps)
    assert all(answer["metrics"] == answers[0]["metrics"] for answer in answers)
    for step in answers[0]["metrics"]:  # the networks' gradients are the parts of the whole, which DeepSpeed measures
        parts = [value for name, value in step.items() if name.startswith("gradient_norm_")]
        assert math.hypot(*parts) == pytest.approx(step["gradient_norm"], rel=FP32_NORM)
    whole, covered = {}, {}
    for answer in answers:
        for piece in answer["moments"]:
            box = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.values.shape, strict=True))
            whole.setdefault(piece.name, torch.zeros(piece.whole))[box] = torch.from_numpy(piece.values)
            covered.setdefault(piece.name, torch.zeros(piece.whole))[box] += 1
    assert all((count == 1).all() for count in covered.values())
    return answers[0]["metrics"], whole


@functools.cache
def one_process(*overrides: str, steps: int = STEPS) -> tuple[list[dict], dict[str, torch.Tensor]]:
    return run_layout(1, list(overrides), steps)


def relative(found: float, expected: float) -> float:
    return abs(found - expected) / abs(expected)


def whole_loss(stage: int) -> tuple[str, ...]:
    """Stage 2 with everything in it: mask view, reference encoder, dropped contexts, clean prefixes."""
    return f"stage={stage}", "training.precision=fp32", "training.vae_update.from_scratch=false"


def assert_same_curve(metrics: list[dict], expected: list[dict]) -> None:
    assert max(relative(mine["loss"], one["loss"]) for mine, one in zip(metrics, expected, strict=True)) <= FP32_CURVE


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_every_gradient_equal_those_of_one_process(layout, stage):
    common = whole_loss(stage)
    ranks, overrides = LAYOUTS[layout]
    steps = LONG if (layout, stage) in LONG_EVERY_DAY else STEPS
    expected, gradients = one_process(*common, steps=steps)
    metrics, found = run_layout(ranks, [*common, *overrides], steps)
    for name, value in expected[0].items():
        assert relative(metrics[0][name], value) <= 1e-5, name
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() <= FP32_GRADIENT * gradient.norm(), name
    assert_same_curve(metrics, expected)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_long_curve_is_that_of_one_process(layout, stage):
    ranks, overrides = LAYOUTS[layout]
    metrics, _ = run_layout(ranks, [*whole_loss(stage), *overrides], LONG)
    assert_same_curve(metrics, one_process(*whole_loss(stage), steps=LONG)[0])


TWO_INTERVALS = 8  # of two joint and three frozen steps, but for the last two


@pytest.mark.parametrize(
    "layout", ["PP 2", "PP 4", "TP 2 x PP 2", "DP 2, ZeRO 0", "DP 2, ZeRO 3", "DP 2, recomputed, on the host"]
)
def test_a_vae_that_is_trained_at_intervals_follows_the_same_curve(layout):
    common = (
        "training.precision=fp32",
        "training.vae_update.from_scratch=false",
        "training.vae_update.mode=interval",
        "training.vae_update.joint_steps=2",
        "training.vae_update.frozen_steps=3",
    )
    ranks, overrides = LAYOUTS[layout]
    metrics, _ = run_layout(ranks, [*common, *overrides], TWO_INTERVALS)
    for mine, one in zip(metrics, one_process(*common, steps=TWO_INTERVALS)[0], strict=True):
        assert mine.keys() == one.keys()
        assert relative(mine["loss"], one["loss"]) <= FP32_CURVE
        assert relative(mine["gradient_norm"], one["gradient_norm"]) <= 10 * FP32_CURVE
    frozen = [step["gradient_norm_vae"] == 0 for step in metrics]
    assert frozen == ([False, False, True, True, True] * 2)[:TWO_INTERVALS]


HOST = "parallel.offload_optimizer=true"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (2, [HOST, "parallel.zero_stage=1"]),
        (2, [HOST, "parallel.zero_stage=3"]),
        (4, [f"{TENSOR}=2", HOST, "parallel.zero_stage=2"]),
        (4, [f"{TENSOR}=2", "parallel.zero_stage=3"]),
    ],
)
def test_the_gradient_of_each_network_is_measured_wherever_zero_keeps_it(ranks, overrides, precision):
    """What the layouts above leave out."""
    common = (f"training.precision={precision}", "training.vae_update.from_scratch=false")
    metrics, _ = run_layout(ranks, [*common, *overrides], 2)
    for mine, one in zip(metrics, one_process(*common, steps=2)[0], strict=True):
        for name in ("gradient_norm_vae", "gradient_norm_dit"):
            assert relative(mine[name], one[name]) <= (FP32_CURVE if precision == "fp32" else 4 * BF16), name


@pytest.mark.parametrize("layout", ["PP 2", "TP 2 x PP 2"])
def test_a_frozen_vae_is_only_used(layout):
    common = (
        "training.precision=fp32",
        "training.vae_update.from_scratch=false",
        "training.vae_update.mode=frozen",
    )
    ranks, overrides = LAYOUTS[layout]
    metrics, found = run_layout(ranks, [*common, *overrides], 5)
    expected, gradients = one_process(*common)
    assert found.keys() == gradients.keys() and all("/dit." in name for name in found)
    assert "gradient_norm_vae" not in metrics[0]
    assert max(relative(mine["loss"], one["loss"]) for mine, one in zip(metrics, expected, strict=False)) <= FP32_CURVE


BF16_LAYOUTS = [name for name in LAYOUTS if "ZeRO 0" not in name and "without ZeRO" not in name]


@pytest.mark.parametrize("layout", BF16_LAYOUTS)
def test_bf16_differs_by_rounding_alone(layout):
    """A sum in another order moves a bfloat16 value by one spacing at most, 2^-8 of itself.

    The loss of a step is a mean over hundreds of such values, so 2^-8 bounds its first value. From then on every
    update rounds anew; the differences of N steps add up to N spacings at the very worst.
    """
    common = ("training.precision=bf16", "parallel.zero_stage=1")
    ranks, overrides = LAYOUTS[layout]
    metrics, _ = run_layout(ranks, [*common, *overrides], 3)
    for step, (mine, one) in enumerate(zip(metrics, one_process(*common, steps=3)[0], strict=True)):
        assert all(torch.isfinite(torch.tensor(list(mine.values()))))
        assert relative(mine["loss"], one["loss"]) <= BF16 * (step + 1), step


@pytest.mark.parametrize("overrides", [(f"parallel.zero_stage={stage}",) for stage in (1, 2, 3)])
def test_gradients_that_are_reduced_in_float32_are_those_of_one_process(overrides):
    """Each sample's gradient is computed in bfloat16 alike wherever it is computed; what remains is a sum in float32.

    The reduction in bfloat16 rounds it to 2^-9, which is seen here too.
    """
    common = ("training.precision=bf16", *overrides)
    _, expected = one_process(*common, steps=1)
    errors = {}
    for kind in ("fp32", "bf16"):
        _, found = run_layout(2, [*common, f"parallel.gradient_reduction={kind}"], 1)
        errors[kind] = max((found[name] - whole).norm() / whole.norm() for name, whole in expected.items())
    assert errors["fp32"] <= FP32_GRADIENT < errors["bf16"]


@pytest.mark.parametrize("layout", ["PP 2", "TP 2 x PP 2", "DP 2, ZeRO 3"])
def test_a_run_is_trained_and_measured_alike(tiny, layout):
    """The whole road: shards, loop, held-out measurement, summary; 23 sequences fill no batch evenly."""
    overrides = ["training.steps=3", "training.evaluation.samples=23", "training.precision=fp32"]
    ranks, parallel = LAYOUTS[layout]
    alone, together = tiny(2, "name=alone", *overrides), tiny(2, "name=together", *overrides, *parallel)
    expected = run_ranks(train_quietly, 1, alone)[0]
    for found in run_ranks(train_quietly, ranks, together):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            # What the context brings is a difference of two losses, which are what is alike to a thousandth.
            of_losses = expected["flow_matching_loss"] if name.startswith("context_") else 0.0
            assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-3 * of_losses), name


def train_quietly(config: RunConfig) -> dict[str, float]:
    from cola_megatron.training.loop import train

    return train(config, progress=False).metrics
