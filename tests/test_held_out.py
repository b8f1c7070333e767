"""What the prior has learned, measured beside what a sceptic would compare it with."""

import math

import numpy as np
import pytest
import torch

from cola_megatron.config import RunConfig, load_config
from cola_megatron.data import TokenShards, held_out_samples
from cola_megatron.families.cola.chain import Cola
from cola_megatron.families.cola.velocity_passes import FIXED_TIMES
from cola_megatron.families.samples import training_sample
from cola_megatron.held_out.measure import evaluate
from cola_megatron.objectives import linear_denoiser as linear
from cola_megatron.parallel import initialize_parallel, initialize_parameters
from tests.shard_folders import LENGTH, write_folder
from tests.support import TINY, perturbed

CHANNELS = 3
MEAN = torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64)
MIXING = torch.tensor([[1.5, 0.0, 0.0], [0.7, 0.4, 0.0], [0.1, -0.2, 0.05]], dtype=torch.float64)
COVARIANCE = MIXING @ MIXING.t()


def gaussian_latents(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    normal, z1 = torch.randn(2, count, CHANNELS, dtype=torch.float64, generator=generator)
    return MEAN + normal @ MIXING.t(), z1


@pytest.mark.parametrize("t", [0.0, 0.025, 0.5, 0.975, 1.0])
def test_the_linear_denoiser_agrees_with_the_closed_form_on_gaussian_latents(t):
    z0, z1 = gaussian_latents(400_000)
    zt, u = (1 - t) * z0 + t * z1, z1 - z0
    matrix = linear.moment_matrix(zt, u, torch.ones(len(zt)))
    predictor = linear.linear_predictor(t, MEAN, COVARIANCE)
    residual = u - predictor[:, 0] - zt @ predictor[:, 1:].t()
    assert linear.linear_error(matrix, predictor) == pytest.approx(residual.square().mean().item(), rel=1e-9)
    # The mean of 1.2 million squares is within 5 standard errors, sqrt(2 / 1.2e6), of its expectation.
    assert linear.linear_error(matrix, predictor) == pytest.approx(
        linear.expected_linear_error(t, COVARIANCE), rel=5 * math.sqrt(2 / 4e5)
    )


def test_no_linear_predictor_is_better():
    z0, z1 = gaussian_latents(200_000)
    t = 0.4
    zt, u = (1 - t) * z0 + t * z1, z1 - z0
    x = torch.cat((torch.ones(len(zt), 1), zt), dim=1)
    fitted = torch.linalg.lstsq(x, u).solution.t()
    assert torch.allclose(fitted, linear.linear_predictor(t, MEAN, COVARIANCE), atol=0.02)


def test_moments_of_latents_come_back_from_those_of_noisy_ones():
    z0, z1 = gaussian_latents(3_000)
    times, parts = torch.tensor([0.1, 0.6, 0.9]), zip(z0.chunk(3), z1.chunk(3), strict=True)
    matrices = torch.stack(
        [
            linear.moment_matrix((1 - t) * clean + t * noise, noise - clean, torch.ones(len(clean)))
            for t, (clean, noise) in zip(times.tolist(), parts, strict=True)
        ]
    )
    mean, covariance = linear.moments_of_latents(matrices, times)
    assert torch.allclose(mean, z0.mean(0), atol=1e-6)
    assert torch.allclose(covariance, torch.cov(z0.t(), correction=0), atol=1e-6)


def repeated(split: str, source: str, number: int) -> np.ndarray:
    """Eight tokens, repeated: a block says all of those behind it, and nothing of another sequence."""
    random = np.random.default_rng([number, len(split)])
    return np.tile(random.integers(3, 300, 8), LENGTH // 8).astype(np.uint16)


def config_of(tmp_path, *overrides: str) -> RunConfig:
    return load_config("tiny", [*TINY, f"runs_folder={tmp_path}", "training.evaluation.samples=48", *overrides])


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> TokenShards:
    folder = write_folder(tmp_path_factory.mktemp("repeated"), {"text": 8}, held_out={"text": 48}, make=repeated)
    return TokenShards(folder, "held_out", verify="none")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Cola:
    """A prior over frozen random latents of repeated sequences, for long enough to look at its context."""
    config = config_of(tmp_path_factory.mktemp("runs"), "training.vae_update.from_scratch=true")
    groups = initialize_parallel()
    model = Cola(config, groups)
    initialize_parameters(model, 1, groups)
    optimizer = torch.optim.Adam(model.dit.parameters(), lr=3e-3)
    for step in range(250):
        rows = [
            training_sample(
                config, repeated("train", "text", 1000 + 32 * step + row).astype(np.int64), -1, -1, row, step
            )
            for row in range(32)
        ]
        batch = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
        optimizer.zero_grad()
        model(batch, train_vae=False)["loss"].backward()
        optimizer.step()
    return model


def test_context_is_a_gain_and_that_of_another_text_is_none(trained, shards, tmp_path):
    found = evaluate(trained, shards, config_of(tmp_path), trained.groups, extras=["shuffled_context"])
    assert found["context_gain"] == pytest.approx(
        found["flow_matching_loss_without_context"] - found["flow_matching_loss"], abs=1e-9
    )
    assert found["context_gain"] > 5 * found["context_gain_standard_error"] > 0
    assert found["context_information"] > 0
    assert found["flow_matching_loss_shuffled_context"] > found["flow_matching_loss_without_context"]
    assert found["flow_matching_loss"] < found["linear_predictor_loss"] < found["constant_predictor_loss"]
    bins = [found[f"flow_matching_loss_bin_{index}"] for index in range(10)]
    assert np.mean(bins) == pytest.approx(found["flow_matching_loss"], rel=1e-6)


def test_a_prior_that_cannot_see_its_context_gains_nothing(shards, tmp_path):
    config = config_of(tmp_path)
    groups = initialize_parallel()
    model = Cola(config, groups)
    initialize_parameters(model, 1, groups)  # its gates are zero: no attention reaches the output
    found = evaluate(model, shards, config, groups, extras=["shuffled_context"])
    assert found["context_gain"] == 0 == found["context_information"]


def test_the_headline_is_a_function_of_model_and_held_out_set_alone(shards, tmp_path):
    groups = initialize_parallel()
    model = Cola(config_of(tmp_path), groups)
    initialize_parameters(model, 1, groups)
    perturbed(model)

    def measured(*overrides: str) -> dict[str, float]:
        return evaluate(model, shards, config_of(tmp_path, *overrides), groups)

    one, other = measured(), measured("seed=5", "data.seed=7", "objective.flow.time.loc=1.7")
    different = "flow_matching_loss_training_times"
    assert one.pop(different) != other.pop(different)
    assert one == other
    several = measured("training.micro_batch_size=2", "training.global_batch_size=2")
    assert several.pop(different) and several == pytest.approx(one, rel=1e-5)


def test_the_linear_denoiser_of_the_latents_is_that_of_their_moments(shards, tmp_path):
    """With every sequence measured, the empirical loss is close to the closed form at each time."""
    config, groups = config_of(tmp_path), initialize_parallel()
    model = Cola(config, groups)
    initialize_parameters(model, 1, groups)
    found = evaluate(perturbed(model), shards, config, groups)
    tokens = torch.from_numpy(np.stack([shards[index] for index in range(len(shards))]).astype(np.int64))
    with torch.no_grad():
        mean, logvar = model.vae.encoder(tokens)
        z0 = model.vae.to_prior(mean).flatten(0, 1).double()
        noise = torch.diag(logvar.exp().flatten(0, 1).double().mean(0) * model.config.model.vae.scaling_factor**2)
    covariance = torch.cov(z0.t(), correction=0) + noise
    expected = np.mean([linear.expected_linear_error(t, covariance) for t in FIXED_TIMES])
    assert found["linear_predictor_loss"] == pytest.approx(expected, rel=0.05)


def test_a_model_that_has_diverged_is_measured_all_the_same(shards, tmp_path):
    config, groups = config_of(tmp_path), initialize_parallel()
    model = Cola(config, groups)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    found = evaluate(model, shards, config, groups)
    assert math.isnan(found["flow_matching_loss"]) and math.isnan(found["linear_predictor_loss"])


def test_held_out_samples_are_spread_over_the_split(tmp_path):
    folder = write_folder(tmp_path / "data", {"text": 8}, held_out={"text": 400})
    shards = TokenShards(folder, "held_out", verify="none")
    order = held_out_samples(shards).order.sample_ids(0, 400)
    assert sorted(order) == list(range(400))
    # A quarter of the first 64 falls into each quarter of the split, give or take 4 standard deviations.
    assert max(abs(np.histogram(order[:64], bins=4, range=(0, 400))[0] - 16)) <= 4 * math.sqrt(64 * 3 / 16)


def test_statistics_of_the_posterior_are_those_of_its_latents(shards, tmp_path):
    """Against the same numbers from the latents themselves: encoded one text at a time, drawn anew."""
    config = config_of(tmp_path, "stage=1", "training.vae_update.from_scratch=false")
    groups = initialize_parallel()
    model = Cola(config, groups)
    initialize_parameters(model, 1, groups)
    perturbed(model)
    found = evaluate(model, shards, config, groups, extras=["posterior_statistics"])
    tokens = torch.from_numpy(np.stack([shards[index].astype(np.int64) for index in range(len(shards))]))
    with torch.no_grad():
        posterior = model.vae.encoder(tokens)
    mean, variance = posterior.mean.flatten(0, 1).double(), posterior.gaussian()[1].exp().flatten(0, 1).double()
    channels = range(config.model.vae.latent_dim)

    def of_dimensions(name: str) -> list[float]:
        return [found[f"posterior_{name}_{index}"] for index in channels]

    assert of_dimensions("mean_square") == pytest.approx(mean.square().mean(0).tolist(), rel=1e-4)
    assert of_dimensions("variance") == pytest.approx(variance.mean(0).tolist(), rel=1e-4)
    kl = 0.5 * (mean.square() + variance - 1 - variance.log()).mean(0)
    assert of_dimensions("kl") == pytest.approx(kl.tolist(), rel=1e-4, abs=1e-6)
    covariance = torch.cov(mean.t(), correction=0) + variance.mean(0).diag()
    assert of_dimensions("eigenvalue") == pytest.approx(
        sorted(torch.linalg.eigvalsh(covariance).tolist())[::-1], rel=1e-4
    )
    assert sum(of_dimensions("signal")) == pytest.approx(torch.cov(mean.t(), correction=0).trace().item(), rel=1e-4)
    # The means are normed over the channels: in one direction they hardly vary, whatever the text.
    assert found["posterior_dead_directions"] >= 1
    assert not any(name.startswith("posterior") for name in evaluate(model, shards, config, groups))
