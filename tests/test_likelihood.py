"""Likelihoods where they are known: a flow between Gaussians, and a linear Gaussian VAE on top of it.

Shapes: R rows, N blocks, D coordinates, X observed coordinates, K samples.
"""

import itertools
import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from cola_megatron.evaluation.statistics import Z_95, ratio_interval
from cola_megatron.inference.flow_density import flow_log_density, with_divergence
from cola_megatron.inference.likelihood_terms import Likelihood, Terms
from cola_megatron.inference.settings import SOLVERS, LikelihoodSettings

D = 6
# Nats per coordinate at 512 steps of a second-order solver; the widths below go down to a posterior's.
TOLERANCE = 2e-4
WIDTHS = torch.tensor([0.1, 0.2, 0.5, 1.0, 1.5, 3.0], dtype=torch.float64)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian_flow(mean: torch.Tensor, covariance_DD: torch.Tensor):
    """E[z1 - z0 | z_t = z] for z0 ~ N(mean, covariance), z1 ~ N(0, I): the flow that generates this Gaussian."""
    one = torch.eye(len(covariance_DD), dtype=torch.float64)

    def velocity(z_RND: torch.Tensor, t: float) -> torch.Tensor:
        of_path = torch.linalg.inv((1 - t) ** 2 * covariance_DD + t**2 * one)
        return (z_RND - (1 - t) * mean) @ ((t * one - (1 - t) * covariance_DD) @ of_path).T - mean

    return velocity


def signs(*shape: int, seed: int = 0) -> torch.Tensor:
    return draw(*shape, seed=seed).sign()


MEAN = draw(D, seed=1)
MIXED = torch.linalg.qr(draw(D, D, seed=2)).Q
CORRELATED = MIXED @ torch.diag(WIDTHS.square()) @ MIXED.T


# ---- the density of a flow ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("adams_bashforth", 2)])
def test_a_diagonal_gaussian_s_density_comes_nearer_with_the_order_of_the_solver(solver, order):
    z_RND = MEAN + WIDTHS * draw(20, 1, D, seed=3)
    expected_RN = Normal(MEAN, WIDTHS).log_prob(z_RND).sum(-1)
    velocity = gaussian_flow(MEAN, torch.diag(WIDTHS.square()))
    # One Rademacher probe is exact here: the Jacobian is diagonal.
    errors = [
        (flow_log_density(velocity, z_RND, solver, steps, signs(20, 1, D)) - expected_RN).abs().max().item() / D
        for steps in (128, 256, 512)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)
    assert errors[-1] < (TOLERANCE if order == 2 else 1e-2)


def test_the_settings_of_a_likelihood_name_the_solvers():
    for solver in SOLVERS:
        assert LikelihoodSettings(solver=solver).solver == solver


def test_blocks_that_depend_on_the_block_before():
    """z_b = A z_(b-1) + c + s e: the densities of the blocks add up to that of one Gaussian over all of them."""
    blocks, a_DD, c_D = 4, 0.5 * draw(D, D, seed=4), draw(D, seed=5)
    s_D = torch.linspace(0.3, 1.2, D, dtype=torch.float64)
    whole = torch.eye(blocks * D, dtype=torch.float64)
    for block in range(1, blocks):
        whole[block * D : (block + 1) * D, (block - 1) * D : block * D] = -a_DD
    to_z = torch.linalg.inv(whole)
    joint = MultivariateNormal(to_z @ c_D.repeat(blocks), to_z @ torch.diag(s_D.square().repeat(blocks)) @ to_z.T)
    z_RND = joint.sample((5,)).unflatten(1, (blocks, D))
    mean_RND = c_D + torch.cat((torch.zeros_like(z_RND[:, :1]), z_RND[:, :-1] @ a_DD.T), dim=1)

    def velocity(z_RND: torch.Tensor, t: float) -> torch.Tensor:
        variance_D = s_D.square()
        slope_D = (t - (1 - t) * variance_D) / ((1 - t) ** 2 * variance_D + t**2)
        return slope_D * (z_RND - (1 - t) * mean_RND) - mean_RND

    found_RN = flow_log_density(velocity, z_RND, "heun", 256, signs(5, blocks, D))
    torch.testing.assert_close(found_RN.sum(-1), joint.log_prob(z_RND.flatten(1)), rtol=0, atol=TOLERANCE * D * blocks)
    per_block_RN = Normal(mean_RND, s_D).log_prob(z_RND).sum(-1)
    torch.testing.assert_close(found_RN, per_block_RN, rtol=0, atol=TOLERANCE * D)


def test_probes_of_a_flow_whose_jacobian_is_not_diagonal():
    """The exact divergence gives the density; Hutchinson's is right in the mean, and signs spread least."""
    target, velocity = MultivariateNormal(MEAN, CORRELATED), gaussian_flow(MEAN, CORRELATED)
    z_11D = target.sample((1, 1))
    exact = flow_log_density(velocity, z_11D, "adams_bashforth", 512, None)
    assert exact.item() == pytest.approx(target.log_prob(z_11D).item(), abs=TOLERANCE * D)
    exact = flow_log_density(velocity, z_11D, "adams_bashforth", 32, None).item()
    rows, spreads = 4000, []
    for probe_RND in (signs(rows, 1, D), draw(rows, 1, D)):
        found_RN = flow_log_density(velocity, z_11D.expand(rows, 1, D), "adams_bashforth", 32, probe_RND)
        spreads.append(found_RN.std().item())
        assert abs(found_RN.mean().item() - exact) < 4 * spreads[-1] / math.sqrt(rows)
    assert 0.1 < spreads[0] < spreads[1]


def test_a_velocity_that_does_not_depend_on_z():
    shift_1D = draw(1, D)
    for probe_RND in (None, signs(3, 2, D)):
        found_RN = flow_log_density(lambda z, t: shift_1D.expand_as(z), draw(3, 2, D, seed=6), "euler", 4, probe_RND)
        expected_RN = Normal(0.0, 1.0).log_prob(draw(3, 2, D, seed=6) + shift_1D).sum(-1)
        torch.testing.assert_close(found_RN, expected_RN)


def test_the_velocity_is_asked_in_the_type_of_z_and_never_keeps_a_graph():
    def velocity(z_RND: torch.Tensor) -> torch.Tensor:
        assert z_RND.dtype == torch.float32
        return z_RND.square()

    z_RND = draw(2, 3, D).float()
    slope_RND, divergence_RN = with_divergence(velocity, z_RND, None)
    assert not slope_RND.requires_grad and divergence_RN.dtype == torch.float64
    torch.testing.assert_close(divergence_RN, (2 * z_RND).sum(-1).double())


# ---- a linear Gaussian VAE ------------------------------------------------------------------------------------------

X = 4
LOADING_XD, OFFSET_X, NOISE = draw(X, D, seed=7), draw(X, seed=8), 0.7
OBSERVED_X = draw(X, seed=9)


def exact_posterior() -> MultivariateNormal:
    """p(z|x) of z ~ N(MEAN, CORRELATED), x ~ N(LOADING z + OFFSET, NOISE^2)."""
    precision = torch.linalg.inv(CORRELATED) + LOADING_XD.T @ LOADING_XD / NOISE**2
    covariance = torch.linalg.inv(precision)
    pull = torch.linalg.solve(CORRELATED, MEAN) + LOADING_XD.T @ (OBSERVED_X - OFFSET_X) / NOISE**2
    return MultivariateNormal(covariance @ pull, (covariance + covariance.T) / 2)


def log_evidence() -> float:
    """log p(x), in closed form."""
    covariance = LOADING_XD @ CORRELATED @ LOADING_XD.T + NOISE**2 * torch.eye(X, dtype=torch.float64)
    return MultivariateNormal(LOADING_XD @ MEAN + OFFSET_X, covariance).log_prob(OBSERVED_X).item()


def estimated(posterior: MultivariateNormal, samples: int) -> Likelihood:
    """The estimate with the prior as a flow, its divergence exact."""
    torch.manual_seed(0)
    z_KD = posterior.sample((samples,))
    reconstruction_K = Normal(z_KD @ LOADING_XD.T + OFFSET_X, NOISE).log_prob(OBSERVED_X).sum(-1)
    prior_KN = flow_log_density(gaussian_flow(MEAN, CORRELATED), z_KD[:, None], "adams_bashforth", 256, None)
    return Likelihood(Terms(reconstruction_K, prior_KN, posterior.log_prob(z_KD)), None, X, None, None)


def test_under_the_exact_posterior_every_weight_is_the_evidence():
    found = estimated(exact_posterior(), 50)
    assert (found.log_weights_K - log_evidence()).abs().max().item() < 10 * TOLERANCE
    assert found.elbo == pytest.approx(log_evidence(), abs=10 * TOLERANCE)
    assert found.iwae == pytest.approx(log_evidence(), abs=10 * TOLERANCE)
    assert found.elbo == pytest.approx(found.reconstruction + found.prior - found.posterior, abs=1e-9)


def test_under_another_posterior_the_elbo_lacks_the_divergence_and_iwae_makes_up_for_it():
    exact = exact_posterior()
    wrong = MultivariateNormal(exact.mean + 0.1 * draw(D, seed=10).sign(), 1.5 * exact.covariance_matrix)
    gap = torch.distributions.kl_divergence(wrong, exact).item()
    found = estimated(wrong, 20_000)
    assert gap > 0.5
    assert abs(log_evidence() - found.elbo - gap) < 4 * found.elbo_error
    means = [
        found.log_weights_K.view(-1, samples).logsumexp(1).mean().item() - math.log(samples)
        for samples in (1, 4, 16, 80, 2000)
    ]
    assert means == sorted(means) and means[-1] < log_evidence() + 0.02
    assert found.iwae == pytest.approx(log_evidence(), abs=0.05)


# ---- figures --------------------------------------------------------------------------------------------------------


def terms(reconstruction: list[float], prior: list[list[float]], posterior: list[float]) -> Terms:
    return Terms(*(torch.tensor(values, dtype=torch.float64) for values in (reconstruction, prior, posterior)))


def test_a_conditional_estimate_is_a_difference():
    joint = terms([-2.0, -4.0], [[-3.0, -1.0], [-5.0, -2.0]], [1.0, 2.0])
    context = terms([-1.0, -1.0], [[-3.0], [-5.0]], [0.5, 0.5])
    found = Likelihood(joint, context, 4, 8, 2)
    assert found.log_weights_K.tolist() == [-2.5, -6.5]
    assert (found.reconstruction, found.prior, found.posterior) == (-2.0, -1.5, 1.0)
    assert found.elbo == -4.5 and found.elbo_error == pytest.approx(2.0)
    assert found.iwae == pytest.approx(math.log((math.exp(-7) + math.exp(-13)) / (math.exp(-4.5) + math.exp(-6.5))))
    assert found.perplexity == pytest.approx(math.exp(4.5 / 4))
    assert found.bits_per_byte == pytest.approx(4.5 / 8 / math.log(2))
    assert found.as_json()["samples"]["log_weights"] == [-2.5, -6.5]


def test_the_interval_of_a_ratio_covers():
    """Of 2,000 drawn sets of texts, the interval holds the true rate in about 95%."""
    generator = torch.Generator().manual_seed(0)
    n, rate, covered = 60, -3.0, 0
    for _ in range(2000):
        sizes = torch.randint(20, 200, (n,), generator=generator).double()
        totals = sizes * (rate + torch.randn(n, generator=generator, dtype=torch.float64))
        interval = ratio_interval(totals.tolist(), sizes.tolist())
        covered += interval.low <= rate <= interval.high
    assert 0.92 < covered / 2000 < 0.965


def test_the_interval_of_a_mean_of_equal_sizes():
    values = [1.0, 2.0, 4.0]
    interval = ratio_interval(values, [1, 1, 1])
    half = Z_95 * torch.tensor(values).std().item() / math.sqrt(3)
    assert interval.value == pytest.approx(7 / 3)
    assert (interval.low, interval.high) == (pytest.approx(7 / 3 - half), pytest.approx(7 / 3 + half))
    assert ratio_interval([3.0], [2.0]).high == math.inf
    with pytest.raises(ValueError, match="are no ratio"):
        ratio_interval([], [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples=0 must be at least 1"),
        ({"steps": 1.5}, "steps=1.5 must be an integer"),
        ({"solver": "midpoint"}, "solver=midpoint must be one of euler, heun, adams_bashforth"),
        ({"divergence": "none"}, "divergence=none must be one of hutchinson, exact"),
        ({"probe": "uniform"}, "probe=uniform must be one of rademacher, gaussian"),
        ({"divergence": "exact", "probe": "gaussian"}, "probe=gaussian needs divergence=hutchinson, not exact"),
        ({"noise_seed": 2**63}, "must lie in"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        LikelihoodSettings(**options)
