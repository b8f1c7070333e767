"""What is measured of held-out texts: the bound of the likelihood, at draws that no run and no batch changes."""

import math

import pytest
import torch

from cola_megatron.families.masked_diffusion.chain import MaskedDiffusion
from cola_megatron.families.masked_diffusion.likelihood import BoundSettings, TransformerDenoiser, estimate
from cola_megatron.families.masked_diffusion.measurement import PASSES, TIME_BINS, MaskedDiffusionMeasurement
from cola_megatron.inference.scored_texts import ScoredText
from cola_megatron.models.steps import run_steps
from tests.test_masked_diffusion import LENGTH, batch_of, config_of, model_of


def measured(model: MaskedDiffusion, samples: range, weights: list[float] | None = None) -> dict[str, torch.Tensor]:
    """The sums over one micro-batch."""
    measurement = MaskedDiffusionMeasurement(model.config)
    batch = batch_of(model.config, samples)
    state = {
        **{name: batch[name] for name in ("tokens", "counted", "documents")},
        "weight": torch.tensor(weights or [1.0] * len(samples), dtype=torch.float64),
        **{name: torch.from_numpy(array) for name, array in measurement.fixed_draws(list(samples)).items()},
    }
    with torch.no_grad():
        found = run_steps(measurement.steps(model), state, keep={"sum_nll", *measurement.shapes})
    return {name: value for name, value in found.items() if name.startswith("sum_")}


@pytest.mark.parametrize("mode", [{}, {"model": {"block_size": 8}}, {"documents": True}])
def test_the_bound_is_that_of_the_likelihood(mode):
    """Which draws other masks, and many more of them."""
    config, samples = config_of(**mode), range(1, 13)  # sample 0 is padded, and its tokens see that
    model, batch = model_of(config), batch_of(config, samples)
    metrics = MaskedDiffusionMeasurement(config).metrics(measured(model, samples))
    # A likelihood takes a text for one document.
    documents = batch["documents"] if config.data.document_attention else torch.zeros_like(batch["documents"])
    texts = [
        ScoredText((), tuple(tokens_L[documents_L == number].tolist()), index, None, None)
        for index, (tokens_L, documents_L) in enumerate(zip(batch["tokens"], documents, strict=True))
        for number in documents_L.unique()
    ]
    denoiser = TransformerDenoiser(model.transformer, config.model.block_size, config.model.mask_id)
    found = estimate(denoiser, texts, BoundSettings(samples=64), 64)
    nats, error = (
        total / batch["tokens"].numel()
        for total in (-sum(each.elbo for each in found), math.sqrt(sum(each.elbo_error**2 for each in found)))
    )
    assert error < 0.02 * nats
    # The measurement has a sixteenth of the draws, hence four times the error.
    assert metrics["nats_per_token"] == pytest.approx(nats, abs=4 * math.hypot(1, 4) * error)


def test_blocks_of_one_token_leave_nothing_to_chance():
    config = config_of({"block_size": 1})
    model, batch = model_of(config), batch_of(config, range(2, 4))
    sums = measured(model, range(2, 4))
    texts = [ScoredText((), tuple(row.tolist()), 0, None, None) for row in batch["tokens"]]
    exact = estimate(TransformerDenoiser(model.transformer, 1, config.model.mask_id), texts, BoundSettings(), 8)
    assert sums["sum_nll"].item() == pytest.approx(-sum(each.elbo for each in exact), rel=1e-6)
    metrics = MaskedDiffusionMeasurement(config).metrics(sums)
    assert metrics["nats_per_token"] == pytest.approx(metrics[f"masked_nll_bin_{TIME_BINS - 1}"], rel=1e-9)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["nats_per_token"]))


def test_sums_add_up_over_micro_batches_and_fillers_weigh_nothing():
    model = model_of(config_of({"block_size": 8}))
    whole = measured(model, range(4))
    parts = [measured(model, range(2)), measured(model, range(2, 4))]
    filled = measured(model, range(6), [1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value, rtol=1e-6, atol=0)
        torch.testing.assert_close(filled[name], value, rtol=1e-6, atol=0)


def test_figures_follow_from_the_sums():
    measurement = MaskedDiffusionMeasurement(config_of())
    by_time = torch.zeros(2, TIME_BINS, dtype=torch.float64)
    by_time[:, 2], by_time[:, 9] = torch.tensor([6.0, 4.0]), torch.tensor([10.0, 2.0])
    per_token = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    spread = torch.stack((torch.tensor(3.0).double(), per_token.sum(), per_token.square().sum()))
    metrics = measurement.metrics(
        {
            "sum_nll": torch.tensor(60.0),
            "sum_tokens": torch.tensor(30.0),
            "sum_spread": spread,
            "sum_by_time": by_time,
        }
    )
    assert metrics == {
        "nats_per_token": 2.0,
        "perplexity": pytest.approx(math.exp(2.0)),
        "nats_per_token_standard_error": pytest.approx(per_token.std().item() / math.sqrt(3)),
        "masked_nll_bin_2": 1.5,
        "masked_nll_bin_9": 5.0,
    }


@pytest.mark.parametrize("block_size", [None, 4])
def test_levels_are_spread_evenly_over_texts_and_passes(block_size):
    config = config_of({"block_size": block_size})
    draws = MaskedDiffusionMeasurement(config).fixed_draws(list(range(100, 132)))
    blocks = LENGTH // config.block_size
    assert draws["mask_level"].shape == (32, PASSES, blocks) and draws["mask_order"].shape == (32, PASSES, LENGTH)
    levels = torch.from_numpy(draws["mask_level"])
    assert torch.histc(levels.float(), 16, 0, 1).tolist() == pytest.approx([levels.numel() / 16] * 16, rel=0.13)
    # Each block of each text has one level in each of as many equal parts as there are passes.
    assert ((levels * PASSES).long().sort(1).values == torch.arange(PASSES)[None, :, None]).all()
    alone = MaskedDiffusionMeasurement(config).fixed_draws([117])
    assert all((draws[name][17] == alone[name][0]).all() for name in draws)
