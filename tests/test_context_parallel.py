"""Sequences cut over ranks: every family's loss and gradients equal those of one process, whatever the other layout.

Run with `-s` to see how far from it they are.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cola_megatron.config import ConfigError, RunConfig, load_config
from cola_megatron.interface import load_model
from tests.ranks import run_ranks
from tests.test_autoregressive_training import SMALL as AUTOREGRESSIVE
from tests.test_layouts import (
    BF16,
    FP32_CURVE,
    FP32_GRADIENT,
    IN_TWO,
    TWO_INTERVALS,
    relative,
    steps_under_layout,
    tiny_config,
    train_quietly,
)
from tests.test_masked_diffusion_training import TINY as MASKED_DIFFUSION
from tests.test_plaid_training import SMALL as PLAID

CONTEXT, TENSOR, PIPELINE = (f"parallel.{kind}_parallel_size" for kind in ("context", "tensor", "pipeline"))
SEQUENCE, DOCUMENTS = "parallel.sequence_parallel=true", "data.document_attention=true"
CHUNKS, RECOMPUTED = "training.loss_chunk_tokens=48", "training.activation_checkpointing=true"
ALL_OF_STAGE_2 = ["training.vae_update.from_scratch=false", "training.precision=fp32"]

MODELS: dict[str, Callable[[list[str]], RunConfig]] = {
    "autoregressive": lambda more: load_config("tiny-autoregressive", [*AUTOREGRESSIVE, IN_TWO, *more]),
    "autoregressive, documents": lambda more: MODELS["autoregressive"]([DOCUMENTS, *more]),
    "autoregressive, Muon": lambda more: MODELS["autoregressive"](["training.optimizer.name=muon", *more]),
    "LLaDA": lambda more: load_config("tiny-masked-diffusion", [*MASKED_DIFFUSION, *more]),
    "masked diffusion by blocks": lambda more: MODELS["LLaDA"](["model.block_size=4", *more]),
    "masked diffusion by blocks, documents, cut": lambda more: MODELS["LLaDA"](
        ["model.block_size=8", DOCUMENTS, "objective.random_length_share=0.3", *more]
    ),
    "Plaid": lambda more: load_config("tiny-plaid", [*PLAID, IN_TWO, *more]),
    "Plaid, untold, documents": lambda more: MODELS["Plaid"](["objective.self_conditioning=0", DOCUMENTS, *more]),
    "stage 1": lambda more: tiny_config(["stage=1", IN_TWO, *ALL_OF_STAGE_2, *more]),
    "stage 2": lambda more: tiny_config(["stage=2", IN_TWO, *ALL_OF_STAGE_2, *more]),
    "stage 2, documents, in chunks": lambda more: MODELS["stage 2"]([DOCUMENTS, "training.attention_chunk=16", *more]),
}
EVERY_DAY = ["autoregressive", "masked diffusion by blocks", "Plaid", "stage 2"]
TOGETHER = {
    "CP 4": (4, [f"{CONTEXT}=4"]),
    "CP 2, ZeRO 0": (2, [f"{CONTEXT}=2", "parallel.zero_stage=0"]),
    "CP 2 x DP 2, ZeRO 1": (4, [f"{CONTEXT}=2"]),
    "CP 2 x DP 2, ZeRO 2, on the host": (
        4,
        [f"{CONTEXT}=2", "parallel.zero_stage=2", "parallel.offload_optimizer=true"],
    ),
    "CP 2 x DP 2, ZeRO 3, recomputed": (4, [f"{CONTEXT}=2", "parallel.zero_stage=3", RECOMPUTED]),
    "CP 2 x PP 2": (4, [f"{CONTEXT}=2", f"{PIPELINE}=2"]),
    "TP 2 x CP 2, head in chunks": (4, [f"{TENSOR}=2", f"{CONTEXT}=2", CHUNKS]),
    "TP 2 x CP 2, sequence parallel": (4, [f"{TENSOR}=2", f"{CONTEXT}=2", SEQUENCE]),
}
SLOW = [(model, layout) for model in MODELS for layout in TOGETHER if (model, layout) != ("Plaid", "CP 2 x PP 2")]


@functools.cache
def one_process(model: str, *overrides: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
    return steps_under_layout(MODELS[model](list(overrides)), 1)


def assert_equal_to_one_process(model: str, ranks: int, overrides: list[str]) -> None:
    expected, gradients = one_process(model)
    metrics, found = steps_under_layout(MODELS[model](overrides), ranks)
    assert found.keys() == gradients.keys()
    terms = {name: relative(metrics[0][name], value) for name, value in expected[0].items()}
    curve = [relative(mine["loss"], one["loss"]) for mine, one in zip(metrics, expected, strict=True)]
    errors = {name: float((found[name] - whole).norm() / whole.norm()) for name, whole in gradients.items()}
    print(f"{model}, {' '.join(overrides)}: loss {max(curve):.1e}, gradient {max(errors.values()):.1e}")
    assert max(terms.values()) <= 1e-5, terms
    assert max(curve) <= FP32_CURVE
    assert max(errors.values()) <= FP32_GRADIENT, max(errors, key=lambda name: errors[name])


@pytest.mark.parametrize("model", EVERY_DAY)
def test_a_sequence_on_two_ranks_has_the_loss_and_every_gradient_of_one_process(model):
    assert_equal_to_one_process(model, 2, [f"{CONTEXT}=2"])


@pytest.mark.slow
@pytest.mark.parametrize(("model", "layout"), SLOW)
def test_so_it_is_beside_every_other_layout(model, layout):
    assert_equal_to_one_process(model, *TOGETHER[layout])


@pytest.mark.slow
@pytest.mark.parametrize("model", EVERY_DAY)
@pytest.mark.parametrize("reduction", ["fp32", "bf16"])
def test_bf16_differs_by_rounding_alone(model, reduction):
    """As in test_layouts.py: a sum in another order, and one more rounding of each update."""
    common = ["training.precision=bf16", "parallel.zero_stage=1"]
    expected, _ = one_process(model, *common)
    more = [*common, f"{CONTEXT}=2", f"parallel.gradient_reduction={reduction}"]
    metrics, _ = steps_under_layout(MODELS[model](more), 2)
    for step, (mine, one) in enumerate(zip(metrics, expected, strict=True)):
        assert math.isfinite(mine["gradient_norm"])
        assert relative(mine["loss"], one["loss"]) <= BF16 * (step + 1), step


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["CP 2 x PP 2", "CP 2 x DP 2, ZeRO 3, recomputed"])
def test_a_vae_that_is_trained_at_intervals_follows_the_same_curve(layout):
    from tests.test_layouts import train_steps

    update = "training.vae_update"
    common = ["stage=2", *ALL_OF_STAGE_2, f"{update}.mode=interval", f"{update}.joint_steps=2"]
    common += [f"{update}.frozen_steps=3"]
    ranks, overrides = TOGETHER[layout]
    one = run_ranks(train_steps, 1, tiny_config(common), TWO_INTERVALS)[0]["metrics"]
    mine = run_ranks(train_steps, ranks, tiny_config([*common, *overrides]), TWO_INTERVALS)[0]["metrics"]
    for found, expected in zip(mine, one, strict=True):
        assert relative(found["loss"], expected["loss"]) <= FP32_CURVE
        assert relative(found["gradient_norm"], expected["gradient_norm"]) <= 10 * FP32_CURVE


def exchanges() -> dict[str, Any]:
    """What one of three ranks gets back: parts, exchanged heads, an even part, and their gradients."""
    from cola_megatron.parallel import initialize_parallel
    from cola_megatron.parallel.sequence_parts import (
        even_parts_from,
        heads_for_positions,
        own_part,
        positions_for_heads,
        whole_sequence,
    )

    groups = initialize_parallel(context_parallel_size=3)
    rank, whole = groups.context_parallel_rank, torch.arange(12 * 2 * 6.0).view(12, 2, 6)
    part = own_part(whole, groups).clone().requires_grad_()
    heads = heads_for_positions(part[..., None], groups)
    found: dict[str, Any] = {
        "whole": torch.equal(whole_sequence(part, groups), whole),
        "heads": torch.equal(heads[..., 0], whole[..., 2 * rank : 2 * rank + 2]),
        "back": torch.equal(positions_for_heads(heads.flatten(2), groups), part),
    }
    for start in (0, 3, 6, 9):
        even = even_parts_from(part, start, groups)
        length = (12 - start) // 3
        first = start + rank * length
        found[f"even from {start}"] = torch.equal(even, whole[first : first + length])
        (gradient,) = torch.autograd.grad((even * even).sum(), part)  # which the owner of a position gets back
        expected = torch.where(torch.arange(12)[:, None, None] >= start, 2 * whole, 0.0)
        found[f"gradient from {start}"] = torch.equal(gradient, own_part(expected, groups))
    (gradient,) = torch.autograd.grad(whole_sequence(part, groups).square().sum(), part)
    found["a sum over the ranks"] = torch.equal(gradient, 3 * 2 * part)
    return found


def test_what_ranks_exchange_comes_back_and_so_do_its_gradients():
    for found in run_ranks(exchanges, 3):
        assert all(found.values()), found


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        (
            "tiny-autoregressive",
            [f"{CONTEXT}=3"],
            "model.transformer.num_attention_heads=4 must be divisible by parallel.context_parallel_size=3",
        ),
        (
            "tiny-autoregressive",
            [f"{CONTEXT}=4", f"{TENSOR}=2"],
            "model.transformer.num_attention_heads=4 must be divisible by parallel.tensor_parallel_size=2 times "
            "parallel.context_parallel_size=4",
        ),
        (
            "tiny-autoregressive",
            [f"{CONTEXT}=2", "data.sequence_length=33"],
            "data.sequence_length=33 must be divisible by parallel.context_parallel_size=2",
        ),
        (
            "tiny-autoregressive",
            [
                "model.transformer.num_attention_heads=12",
                "model.transformer.hidden_size=48",
                "model.transformer.num_key_value_heads=3",
                f"{CONTEXT}=2",
            ],
            "model.transformer.num_key_value_heads=3 over parallel.tensor_parallel_size=1 must be a multiple or a "
            "divisor of parallel.context_parallel_size=2",
        ),
        (
            "tiny",
            ["stage=2", "model.dit.block_size=1", f"{CONTEXT}=2"],
            "latents - block_size = ",
        ),
    ],
)
def test_what_ranks_cannot_share_is_refused_in_one_line(preset, overrides, message):
    with pytest.raises(ConfigError) as refusal:
        load_config(preset, overrides)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_plan_keeps_the_context_of_the_config_and_divides_what_it_divides():
    from cola_megatron.planning.hardware import GPUS
    from cola_megatron.planning.memory import rank_memory
    from cola_megatron.planning.plan import Cluster, plan
    from cola_megatron.planning.split import pipeline_split

    one, four = (
        load_config("paper-2b-autoregressive", ["data.sequence_length=32768", f"{CONTEXT}={ranks}"]) for ranks in (1, 4)
    )
    alone, shared = (rank_memory(config, 1, pipeline_split(config))[0] for config in (one, four))
    assert shared.activations / alone.activations == pytest.approx(1 / 4, rel=0.05)
    assert shared.states.weights == alone.states.weights
    assert shared.states.optimizer == pytest.approx(alone.states.optimizer / 4)
    layouts, _ = plan(four, Cluster(64, GPUS["h100"], 80 * 2**30))
    for layout in layouts:
        parallel = layout.config.parallel
        assert parallel.context_parallel_size == 4 and f"{CONTEXT}=4" in layout.overrides
        assert layout.replicas * parallel.ranks_of_a_replica == 64
        assert layout.times[0][0].sent_context > 0


def measured_and_resumed(
    build: Callable[..., RunConfig], layout: list[str], ranks: int, *overrides: str
) -> tuple[RunConfig, RunConfig]:
    """Trained and measured in one process and on ranks that share sequences; and begun on these, ended in one."""
    alone, together = build("name=alone", *overrides), build("name=together", *overrides, *layout)
    resumed = build("name=resumed", *overrides)
    expected = run_ranks(train_quietly, 1, alone)[0]
    run_ranks(train_quietly, ranks, build("name=resumed", "training.stop_after=2", *overrides, *layout))
    for found in (*run_ranks(train_quietly, ranks, together), run_ranks(train_quietly, 1, resumed)[0]):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            # A difference of two losses is alike to a thousandth of them, and so is its error.
            size = expected["flow_matching_loss"] if name.startswith("context_") else 0.0
            assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-3 * size), name
    texts = [(config.run_folder / "texts.jsonl").read_text() for config in (alone, together)]
    assert len(set(texts)) == 1
    return alone, together


MEASURED = ("training.evaluation.samples=7", "training.evaluation.texts=2", "training.steps=4")


def test_a_run_is_measured_resumed_and_generates_as_one_process_does(corpus: Path, tmp_path: Path):
    def build(*overrides: str) -> RunConfig:
        places = [f"data.path={corpus}", f"runs_folder={tmp_path / 'runs'}"]
        return MODELS["autoregressive"]([*places, *overrides])

    runs = measured_and_resumed(build, [f"{CONTEXT}=2"], 2, *MEASURED)
    models = [load_model(config.run_folder, device="cpu") for config in runs]
    first, second = (model.generate(["the prior"], max_new_tokens=8)[0].token_ids.tolist() for model in models)
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize("model", ["masked diffusion by blocks", "LLaDA", "Plaid", "stage 1", "stage 2"])
def test_so_is_a_run_of_every_family(corpus: Path, tmp_path: Path, model: str):
    def build(*overrides: str) -> RunConfig:
        places = [f"data.path={corpus}", f"runs_folder={tmp_path / 'runs'}"]
        scratch = ["training.vae_update.from_scratch=true"] if model.startswith("stage") else []
        return MODELS[model]([*places, *scratch, *overrides])

    layout = [f"{CONTEXT}=2", f"{TENSOR}=2", SEQUENCE]
    measured_and_resumed(build, layout, 4, *MEASURED)
