"""Plaid in training: its definition, its chain, the layouts, what a held-out measurement says of it."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from cola_megatron.config import ConfigError, load_config
from cola_megatron.config.plaid import PlaidConfig
from cola_megatron.families import family_of
from cola_megatron.families.plaid.chain import Plaid
from cola_megatron.families.plaid.loss import plaid_loss
from cola_megatron.families.plaid.measurement import PlaidMeasurement
from cola_megatron.models.steps import cut_chain, run_steps
from cola_megatron.parallel import (
    gather_state_dict,
    initialize_parallel,
    initialize_parameters,
    marks_of,
    sum_partial_gradients,
)
from tests.ranks import run_ranks
from tests.support import random_batch

LENGTH, VOCABULARY = 16, 301  # an odd vocabulary: shards are padded
TRANSFORMER = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4}
FP32 = 1e-5  # of each tensor's norm: float32 sums in another order


def config_of(
    objective: dict[str, Any] | None = None, document_attention: bool = False, parallel: dict | None = None, **training
) -> PlaidConfig:
    return PlaidConfig.model_validate(
        {
            "model": {
                "family": "plaid",
                "vocab_size": VOCABULARY,
                "transformer": TRANSFORMER,
                "diffusion": {"embedding_dim": 4, "schedule_hidden_size": 16},
            },
            "objective": {"output_prior_warmup_steps": 4, "cut_share": 0.3, **(objective or {})},
            "data": {"sequence_length": LENGTH, "document_attention": document_attention},
            "training": {"precision": "fp32", "global_batch_size": 8, "micro_batch_size": 4, **training},
            "parallel": parallel or {},
        }
    )


def model_of(config: PlaidConfig, *layout: Any) -> Plaid:
    """Away from its start, at which the maps of level and first estimate are closed; alike in every layout."""
    groups = initialize_parallel(*layout)
    model = Plaid(config, groups)
    for parameter in model.parameters():
        marks = marks_of(parameter)
        parameter.marks = replace(marks, initializer=shaken(marks.initializer))
    initialize_parameters(model, config.seed, groups)
    return model


def shaken(initializer):
    def start(whole: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return initializer(whole, generator).add_(0.1 * torch.randn(whole.shape, generator=generator))

    return start


def batch_of(config: PlaidConfig, samples: int = 8, step: int = 1) -> dict[str, torch.Tensor]:
    """Texts of which the first has padding and the first two have two documents."""
    batch = random_batch(config, range(step * samples, (step + 1) * samples), step)
    batch["documents"][:2, 9:] = 1
    batch["counted"][0, 13:], batch["documents"][0, 13:] = False, -1
    return batch


def assert_same_gradients(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Up to the rounding of float32.

    The schedule's shape is one function, and gradients of parts of it may be small differences of large ones: a noise
    that is rounded otherwise (6e-8) moves that of `input_bias` by 1e-5 of itself. So the whole shape is the measure.
    """
    assert found.keys() == expected.keys()
    norms = {name: float(np.linalg.norm(gradient)) for name, gradient in expected.items()}
    of_shape = math.hypot(*(norm for name, norm in norms.items() if name.startswith("plaid.schedule.")))
    for name, gradient in expected.items():
        size = of_shape if name.startswith("plaid.schedule.") else norms[name]
        assert float(np.linalg.norm(found[name] - gradient)) <= FP32 * size + 1e-9, name


def gradients(model: Plaid, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, named.values()), strict=True))


CHAINS = {
    "plain": {},
    "documents": {"document_attention": True},
    "no self-conditioning": {"objective": {"self_conditioning": 0}},
    "all self-conditioned": {"objective": {"self_conditioning": 1}},
    "nobody is cut": {"objective": {"cut_share": 0}},
    "recomputed": {"activation_checkpointing": True},
    "in chunks": {"loss_chunk_tokens": 40},
}


@pytest.mark.parametrize("name", CHAINS)
def test_the_chain_computes_the_definition(name):
    config = config_of(**CHAINS[name])
    model = model_of(config)
    batch = batch_of(config)
    in_chain, defined = model(batch), plaid_loss(model.transformer, model.plaid, batch, config)
    assert in_chain.keys() == defined.keys()
    assert all(torch.equal(in_chain[term], defined[term]) for term in in_chain)
    expected, found = gradients(model, defined["loss"]), gradients(model, in_chain["loss"])
    assert all(torch.equal(found[parameter], gradient) for parameter, gradient in expected.items())
    trained = {name for name, gradient in expected.items() if gradient.any()}
    of_network = {name for name in expected if not name.startswith(("plaid.embeddings", "plaid.schedule"))}
    assert trained == (of_network if name == "all self-conditioned" else set(expected))


def test_chunks_and_recomputation_change_nothing_but_rounding():
    plain, batch = config_of(), batch_of(config_of())
    model = model_of(plain)
    expected = gradients(model, model(batch)["loss"])
    for training in ({"loss_chunk_tokens": 24}, {"activation_checkpointing": True}):
        other = model_of(config_of(**training))
        found = gradients(other, other(batch)["loss"])
        assert_same_gradients(found, expected)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_add_up_to_the_global_batch(micro):
    config = config_of()
    model, batch = model_of(config), batch_of(config)
    whole = model(batch)
    parts = [model({name: rows[start : start + micro] for name, rows in batch.items()}) for start in range(0, 8, micro)]
    for name, value in whole.items():
        assert torch.stack([part[name] for part in parts]).mean().item() == pytest.approx(value.item(), rel=1e-5), name
    loss = sum(part["loss"] for part in parts) / len(parts)
    expected, found = gradients(model, whole["loss"]), gradients(model, loss)
    assert_same_gradients(found, expected)


def test_padding_does_not_count_and_documents_do_not_see_each_other():
    config = config_of({"cut_share": 0}, document_attention=True)
    model, batch = model_of(config), batch_of(config)
    noise = torch.randn(batch["noise"].shape[1:], generator=torch.Generator().manual_seed(5))

    def terms(change: slice) -> torch.Tensor:
        """nll and distance of the first text where other positions have other tokens and noises."""
        other = {name: tensor.clone() for name, tensor in batch.items()}
        other["tokens"][0, change], other["noise"][0, change] = 7, noise[change]
        state = run_steps(model.steps(), other, keep=["nll", "distance"])
        assert other["time"][0] == batch["time"][0]
        return torch.stack((state["nll"][:, 0], state["distance"][:, 0])), state["loss_prior"]

    same, prior = terms(slice(0, 0))
    padding, of_padding = terms(slice(13, None))
    assert torch.allclose(padding[:, :13], same[:, :13], atol=1e-5) and torch.equal(prior, of_padding)
    second, _ = terms(slice(9, 13))
    assert torch.allclose(second[:, :9], same[:, :9], atol=1e-5)
    assert not torch.allclose(second[:, 9:13], same[:, 9:13], atol=1e-2)


def test_a_cut_sample_is_two_texts():
    config = config_of({"cut_share": 1})
    model, batch = model_of(config), batch_of(config)
    cut = int(batch["cut"][1])
    state = run_steps(model.steps(), batch, keep=["distance", "nll"])
    batch["tokens"][1, cut:] = 3
    other = run_steps(model.steps(), batch, keep=["distance", "nll"])
    assert torch.allclose(state["nll"][:cut, 1], other["nll"][:cut, 1], atol=1e-5)
    assert not torch.allclose(state["nll"][cut:, 1], other["nll"][cut:, 1], atol=1e-2)


def test_a_first_estimate_is_what_the_network_says_without_one():
    config = config_of({"cut_share": 0})
    model, batch = model_of(config), batch_of(config)
    state = run_steps(model.steps(), batch, keep=["first", "x", "z", "gamma", "embeddings", "context"])
    told = batch["self_conditioned"]
    assert told.any() and not told.all()
    expected = model.denoiser.estimate(
        state["z"], state["gamma"], batch["output_prior"], state["embeddings"], None, state["context"]
    )
    assert torch.allclose(state["first"][:, told], expected[:, told], atol=1e-6)
    assert not state["first"][:, ~told].any() and not state["first"].requires_grad
    # Other samples do not change with it; those that were told it do.
    changed = run_steps(model.steps(), {**batch, "self_conditioned": torch.zeros_like(told)}, keep=["nll"])
    nll = run_steps(model.steps(), batch, keep=["nll"])["nll"]
    assert torch.allclose(changed["nll"][:, ~told], nll[:, ~told], atol=1e-5)
    assert (changed["nll"] - nll)[:, told].abs().max() > 1e-3


def test_a_first_estimate_in_a_pipeline_is_refused_in_one_line():
    with pytest.raises(
        ValidationError, match=r"objective.self_conditioning=0.25 with parallel.pipeline_parallel_size=2"
    ):
        config_of(parallel={"pipeline_parallel_size": 2})
    with pytest.raises(ValueError, match="a stage of a pipeline cannot run the whole network"):
        Plaid(config_of(), initialize_parallel(), [3, 3])
    with pytest.raises(ValidationError, match=r"training.global_batch_size=1: Plaid needs at least 2 samples"):
        config_of(global_batch_size=1, micro_batch_size=1)
    with pytest.raises(ConfigError, match=r"gamma_start=7.0 must be below gamma_end=6.0"):
        load_config("tiny-plaid", ["model.diffusion.gamma_start=7"])


@pytest.mark.parametrize("size", ["tiny", "small", "base", "paper-2b"])
def test_a_preset_has_the_parameters_that_its_parts_count(size):
    config = load_config(f"{size}-plaid")
    parts = family_of(config).parts(config)
    with torch.device("meta"):
        model = Plaid(config, initialize_parallel())
    assert sum(part.parameters for part in parts) == sum(parameter.numel() for parameter in model.parameters())
    heavy = [step for step in model.steps() if step.modules]
    assert [step.part for step in heavy] == [part.label for part in parts]
    for step, part in zip(heavy, parts, strict=True):
        own = sum(parameter.numel() for module in step.modules for parameter in module.parameters())
        assert own == part.parameters, part.label


def test_the_first_estimate_is_counted_with_its_share():
    told, not_told = config_of(), config_of({"self_conditioning": 0})
    flops = [sum(part.flops for part in family_of(config).parts(config)) for config in (told, not_told)]
    more = config_of({"self_conditioning": 1})
    assert sum(part.flops for part in family_of(more).parts(more)) / flops[0] == pytest.approx((3 + 1) / (3 + 0.25))
    assert flops[1] < flops[0] * 3 / 3.25 * 1.001


# ---- layouts ----


def on_a_rank(config: PlaidConfig, *layout: Any) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]:
    """Loss and its terms, and whole gradients."""
    model = model_of(config, *layout)
    sum_partial_gradients(model, model.groups)
    batch = batch_of(config)
    terms = model(batch)
    terms["loss"].backward()
    whole = gather_state_dict(model, model.groups, values=lambda parameter: parameter.grad)
    return {name: term.item() for name, term in terms.items()}, {name: value.numpy() for name, value in whole.items()}


@pytest.mark.parametrize("objective", [{}, {"self_conditioning": 0}])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_ranks_compute_the_same_loss_and_gradients(sequence_parallel, objective):
    config = config_of(objective, loss_chunk_tokens=48)
    terms, whole = on_a_rank(config)
    for found_terms, found in run_ranks(on_a_rank, 2, config, 2, sequence_parallel):
        for name, value in terms.items():
            assert found_terms[name] == pytest.approx(value, rel=1e-5), name
        assert_same_gradients(found, whole)


@pytest.mark.parametrize("split", [[1, 5], [2, 4], [3, 3], [5, 1], [1, 1, 1, 1, 1, 1]])
def test_stages_of_a_pipeline_compute_the_same_loss_and_gradients(split):
    config = config_of({"self_conditioning": 0})
    model, batch = model_of(config), batch_of(config)
    whole = model(batch)
    expected = gradients(model, whole["loss"])
    total, state = torch.zeros(()), {}
    for stage in cut_chain(model.steps(), split, model.batch_names):
        state = run_steps(stage.steps, {**batch, **{name: state[name] for name in stage.takes}}, keep=stage.hands_on)
        total = total + sum(value for name, value in state.items() if name.startswith("loss_"))
        assert "noise" not in stage.hands_on and "context" not in stage.hands_on
    assert total.item() == pytest.approx(whole["loss"].item(), rel=1e-6)
    found = gradients(model, total)
    assert_same_gradients(found, expected)


# ---- the held-out measurement ----


def measured(model: Plaid, config: PlaidConfig, samples: range) -> dict[str, torch.Tensor]:
    measurement = PlaidMeasurement(config)
    batch = {name: tensor[: len(samples)] for name, tensor in batch_of(config).items()}
    draws = {name: torch.from_numpy(array) for name, array in measurement.fixed_draws(samples).items()}
    inputs = {name: batch[name] for name in ("tokens", "counted", "documents")}
    inputs |= draws | {"weight": torch.ones(len(samples), dtype=torch.float64)}
    chain = measurement.steps(model)
    model.own_stage_of(chain, set(inputs), ["sum_moments"])  # holds together
    with torch.no_grad():
        return run_steps(chain, inputs, keep=["sum_moments"])


@pytest.mark.parametrize("share", [0, 0.25])
def test_a_measurement_is_the_bound_at_fixed_draws(share):
    config = config_of({"self_conditioning": share}, document_attention=True)
    model = model_of(config)
    state = measured(model, config, range(4))
    again = measured(model, config, range(4))
    assert torch.equal(state["sum_moments"], again["sum_moments"])
    metrics = PlaidMeasurement(config).metrics({"sum_moments": state["sum_moments"]})
    terms = [metrics[f"{name}_nats_per_token"] for name in ("reconstruction", "prior", "diffusion")]
    assert metrics["nats_per_token"] == pytest.approx(sum(terms))
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["nats_per_token"]))
    tokens = 4 * LENGTH - 3
    # An untrained model knows nothing: near the nats of a uniform guess, within a few of these large errors.
    assert metrics["nats_per_token"] == pytest.approx(math.log(VOCABULARY), abs=6 * 4)
    assert state["sum_moments"][0, 1] == tokens
    assert 0 < metrics["nats_per_token_standard_error"] < 20


def test_weights_leave_fillers_out_of_a_measurement():
    config = config_of()
    model, measurement = model_of(config), PlaidMeasurement(config)
    batch = batch_of(config)
    inputs = {name: batch[name][:4] for name in ("tokens", "counted", "documents")}

    def moments(samples: list[int], weight: list[float]) -> torch.Tensor:
        draws = {name: torch.from_numpy(array) for name, array in measurement.fixed_draws(samples).items()}
        rows = {name: tensor[torch.tensor(samples)] for name, tensor in inputs.items()}
        with torch.no_grad():
            weights = {"weight": torch.tensor(weight, dtype=torch.float64)}
            return run_steps(measurement.steps(model), rows | draws | weights, keep=["sum_moments"])["sum_moments"]

    whole = moments([0, 1, 2, 3], [1.0] * 4)
    parts = moments([0, 1], [1.0, 1.0]) + moments([2, 3], [1.0, 1.0])
    filled = moments([0, 1, 2, 3], [1.0, 1.0, 1.0, 0.0]) + moments([3, 0], [1.0, 0.0])
    assert torch.allclose(whole, parts, rtol=1e-5) and torch.allclose(whole, filled, rtol=1e-5)
