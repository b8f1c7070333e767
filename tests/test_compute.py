"""What a run costs in each column, against torch's counter; how many steps a budget is; what N counts."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, mm_flop, sdpa_backward_flop_count, sdpa_flop_count

from cola_megatron.config import ConfigError, RunConfig, load_config
from cola_megatron.families import family_of
from cola_megatron.parallel import initialize_parallel, initialize_parameters
from cola_megatron.planning.compute import amount_by_step, compute_of, cost_of, parameters_of, steps_for
from tests.support import random_batch

SAMPLES = 8
SMALL = [
    "data.sequence_length=64",
    "model.vocab_size=300",
    f"training.micro_batch_size={SAMPLES}",
    f"training.global_batch_size={SAMPLES}",
]
PLAID = ["objective.cut_share=0"]  # a sample that is cut has a mask: which are cut is in the draws
RUNS = {
    "autoregressive": ("tiny-autoregressive", []),
    "autoregressive, shared heads": ("tiny-autoregressive", ["model.transformer.num_key_value_heads=2"]),
    "autoregressive, by document": ("tiny-autoregressive", ["data.document_attention=true"]),
    "autoregressive, in chunks": ("tiny-autoregressive", ["training.loss_chunk_tokens=64"]),
    "masked diffusion": ("tiny-masked-diffusion", []),
    "block diffusion": ("tiny-masked-diffusion", ["model.block_size=16"]),
    "block diffusion, small products": (
        "tiny-masked-diffusion",
        ["model.block_size=16", "training.attention_chunk=32"],
    ),
    "Plaid": ("tiny-plaid", PLAID),
    "Plaid, in chunks": ("tiny-plaid", [*PLAID, "training.loss_chunk_tokens=64"]),
    "stage 1": ("tiny", ["stage=1"]),
    "stage 2": ("tiny", ["stage=2"]),
    "stage 2, by document": ("tiny", ["stage=2", "data.document_attention=true"]),
    "stage 2, small products": ("tiny", ["stage=2", "training.attention_chunk=32"]),
    "stage 2, VAE by blocks": ("tiny", ["stage=2", "model.vae.block_size=4"]),
    "stage 2, VAE frozen": ("tiny", ["stage=2", "training.vae_update.mode=frozen"]),
    "stage 2, one step of both kinds": (
        "tiny",
        ["stage=2", *(f"training.vae_update.{key}" for key in ("mode=interval", "joint_steps=1", "frozen_steps=1"))],
    ),
}


@pytest.mark.parametrize("recomputed", ["false", "true"])
@pytest.mark.parametrize("name", RUNS)
def test_the_hardware_column_is_what_torch_counts_in_training_steps(name, recomputed):
    preset, overrides = RUNS[name]
    config = load_config(preset, [*SMALL, f"training.activation_checkpointing={recomputed}", *overrides])
    compute = compute_of(config, family_of(config).period(config))
    assert counted(config) == pytest.approx(compute["hardware"], rel=0.005)
    # Attention computes its scores again in any case.
    assert compute["hardware"] > (1.25 if recomputed == "true" else 1) * compute["model"]


def test_model_flops_do_not_depend_on_how_a_run_is_run():
    ways = ["training.activation_checkpointing=true", "training.loss_chunk_tokens=0", "training.micro_batch_size=4"]
    for preset in ("base", "base-autoregressive", "base-masked-diffusion", "base-plaid"):
        plain, other = (compute_of(load_config(preset, given), 10) for given in ([], ways))
        assert plain["model"] == other["model"] and plain["nominal"] == other["nominal"]
        assert plain["hardware"] < other["hardware"]


@pytest.mark.parametrize(("steps", "exaflops"), [(10_000, 77.86), (15_000, 116.78), (250_000, 1_946)])
def test_the_nominal_column_is_the_axis_of_the_paper(steps, exaflops):
    for preset in ("paper-2b", "paper-2b-autoregressive", "paper-2b-masked-diffusion", "paper-2b-plaid"):
        assert compute_of(load_config(preset), steps)["nominal"] / 1e18 == pytest.approx(exaflops, rel=5e-4)
    assert compute_of(load_config("paper-2b", ["stage=1"]), steps)["nominal"] == 0.0


@pytest.mark.parametrize("overrides", [[], ["training.vae_update.mode=interval"], ["training.vae_update.mode=frozen"]])
def test_steps_for_a_budget_are_those_that_it_pays_for(overrides):
    config = load_config("paper-2b", overrides)
    for steps in (1, 2_000, 2_001, 4_999, 144_115):
        cost = cost_of(config, steps)
        for column, amount in {**cost.compute, "tokens": cost.tokens, "steps": steps}.items():
            assert steps_for(config, column, amount) == steps, column
            assert steps_for(config, column, amount * 1.004) == pytest.approx(steps, rel=0.005), column


def test_the_nearest_number_of_steps_is_taken():
    config = load_config("tiny")
    one = amount_by_step(config, "tokens")(1)
    assert [steps_for(config, "tokens", share * one) for share in (200.4, 200.6, 0.995)] == [200, 201, 1]


def test_a_budget_that_no_number_of_steps_comes_near_is_refused_in_one_line():
    config = load_config("tiny")
    one = amount_by_step(config, "model")(1)
    for column, amount, words in (
        ("model", one / 3, r"below one step of tiny, which takes 7\.453e\+10: take a larger budget or a smaller"),
        ("model", 1.4 * one, r"is -28\.6% from the nearest whole number of steps of tiny, 1: .*global_batch_size"),
        ("tokens", -5, "must be above 0"),
        ("hardware", float("inf"), "must be above 0"),
        ("dollars", 5, "'dollars' is no budget: give one of steps, tokens, nominal, model, hardware"),
    ):
        with pytest.raises(ConfigError, match=words) as refusal:
            steps_for(config, column, amount)
        assert "\n" not in str(refusal.value)
    assert steps_for(config, "model", 1.4 * one, tolerance=0.3) == 1
    with pytest.raises(ConfigError, match="stage 1 has none"):
        steps_for(load_config("tiny", ["stage=1"]), "nominal", 1e18)


def test_n_is_the_backbone_or_all_that_is_trained():
    assert parameters_of(load_config("paper-2b-autoregressive")) == {
        "without embeddings": 1_812_049_920,
        "all": 1_812_051_968 + 410_738_688,
    }
    prior, vae = 1_829_875_728, 501_871_574
    for mode, trained in (("joint", prior + vae), ("interval", prior + vae), ("frozen", prior)):
        found = parameters_of(load_config("paper-2b", [f"training.vae_update.mode={mode}"]))
        assert found == {"without embeddings": prior, "all": trained}, mode
    first = parameters_of(load_config("paper-2b", ["stage=1"]))
    assert first["all"] == vae and 0 < first["without embeddings"] < vae


def counted(config: RunConfig) -> float:
    """FLOPs that torch counts in a period of steps, by its formulas also of the CPU's attention and sums in place."""
    family, groups = family_of(config), initialize_parallel()
    model = family.build(config, groups)
    initialize_parameters(model, config.seed, groups)
    batch = random_batch(config, range(SAMPLES))
    if "self_conditioned" in batch:
        assert batch["self_conditioned"].float().mean() == config.objective.self_conditioning
    aten = torch.ops.aten
    mapping: dict[Any, Any] = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        aten.addmm_: lambda total, left, right, **others: mm_flop(left, right),
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        for step in range(family.period(config)):
            model(batch, **family.mode_at(config, step))["loss"].backward()
    return counter.get_total_flops()


def _kept(query: torch.Tensor, causal: bool) -> float:
    """Share of the pairs that the kernel computes: a causal one skips what it hides."""
    length = query.shape[-2]
    return (length + 1) / (2 * length) if causal else 1.0


def _attention_forward(query, key, value, dropout=0.0, is_causal=False, **others) -> float:
    return _kept(query, is_causal) * sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(gradient, query, key, value, out, statistics, dropout, is_causal, **others) -> float:
    return _kept(query, is_causal) * sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


for formula in (_attention_forward, _attention_backward):
    formula._get_raw = True  # called with tensors, not with their shapes
