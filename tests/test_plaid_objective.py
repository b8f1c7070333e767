"""Plaid's bound, its schedule and its draws, against what is known exactly."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from cola_megatron.config.plaid import PlaidObjectiveConfig
from cola_megatron.families.plaid.categorical import Prediction, embeddings_of, predict, with_output_prior
from cola_megatron.families.plaid.draws import plaid_draws, reconstruction_samples, spread_time
from cola_megatron.families.plaid.schedule import SHAPE_GRADIENT, NoiseSchedule, report_loss
from cola_megatron.objectives.plaid import (
    alpha_sigma,
    ancestral_step,
    diffusion_term,
    likelihood_scale,
    noisy_embeddings,
    prior_kl,
    squared_distance,
    tempered_estimate,
    unit_variance,
)
from cola_megatron.parallel import initialize_parallel, initialize_parameters


def schedule(hidden_size: int = 8, start: float = -3.0, end: float = 6.0) -> NoiseSchedule:
    made = NoiseSchedule(hidden_size, start, end).double()
    initialize_parameters(made, 0, initialize_parallel())
    return made


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


GAMMA = torch.tensor([-4.0, -1.0, 0.5, 3.0, 7.0], dtype=torch.float64)


def test_a_state_has_the_signal_to_noise_ratio_of_its_level():
    alpha, sigma = alpha_sigma(GAMMA)
    assert torch.allclose(alpha**2 + sigma**2, torch.ones_like(GAMMA))
    assert torch.allclose((alpha / sigma).square().log(), -GAMMA)
    x, noise = normal(3, 5, 4), normal(3, 5, 4, seed=1)
    assert torch.allclose(noisy_embeddings(x, noise, GAMMA), alpha[:, None] * x + sigma[:, None] * noise)


def test_the_input_of_the_network_has_unit_variance():
    x = F.normalize(normal(20_000, 5, 16), dim=-1)
    z = unit_variance(noisy_embeddings(x, normal(20_000, 5, 16, seed=1), GAMMA), GAMMA)
    assert torch.allclose(z.var(dim=(0, 2)), torch.ones(5, dtype=torch.float64), atol=0.02)


def test_the_prior_term_is_the_divergence_of_gaussians():
    x = normal(3, 5, 4)
    alpha, sigma = alpha_sigma(GAMMA)
    q = Normal(alpha[:, None] * x, sigma[:, None].expand_as(x))
    assert torch.allclose(prior_kl(x, GAMMA), kl_divergence(q, Normal(0.0, 1.0)).sum(-1))


def test_the_output_prior_is_the_likelihood_of_a_state_under_each_embedding():
    embeddings, z = F.normalize(normal(7, 4), dim=-1), normal(5, 4, seed=1)
    alpha, sigma = alpha_sigma(GAMMA)
    exact = Normal(alpha[:, None, None] * embeddings, sigma[:, None, None]).log_prob(z[:, None]).sum(-1)
    scores = likelihood_scale(GAMMA)[:, None] * (z @ embeddings.t())
    assert torch.allclose(scores.log_softmax(-1), exact.log_softmax(-1))


def test_an_ancestral_step_leads_from_one_level_to_the_other():
    """From q(z_t | x) and with x_hat = x it leads to q(z_s | x): its mean, and its variance from both noises."""
    x, none, one = normal(1, 1, 3), torch.zeros(1, 1, 3).double(), torch.ones(1, 1, 3).double()
    for above, below in itertools.combinations(GAMMA.flip(0)[:, None], 2):
        (alpha_above, sigma_above), (alpha_below, sigma_below) = alpha_sigma(above), alpha_sigma(below)
        mean = ancestral_step(alpha_above * x, x, none, above, below)
        of_z, of_noise = ancestral_step(one, none, none, above, below), ancestral_step(none, none, one, above, below)
        assert torch.allclose(mean, alpha_below * x)
        assert torch.allclose((of_z * sigma_above) ** 2 + of_noise**2, sigma_below**2 * one)


def test_a_tempered_estimate_is_that_of_a_larger_noise():
    x, z, level = normal(2, 1, 3), normal(2, 1, 3, seed=1), GAMMA[2:3]
    alpha, sigma = alpha_sigma(level)
    assert torch.allclose(tempered_estimate(z, x, level, 1.0), x)
    tempered = tempered_estimate(z, x, level, 0.8)
    assert torch.allclose((z - alpha * tempered) / sigma, (z - alpha * x) / sigma / 0.8)


# ---- the schedule ----


def test_the_schedule_rises_from_end_to_end():
    levels = schedule()(torch.linspace(0, 1, 50, dtype=torch.float64))
    assert levels.gamma_B[0].item() == -3.0 and levels.gamma_B[-1].item() == pytest.approx(6.0, abs=1e-12)
    assert (levels.gamma_B.diff() > 0).all() and (levels.slope_B > 0).all()


def test_the_slope_is_the_derivative():
    times = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    made, width = schedule(), 1e-6
    difference = (made(times + width).gamma_B - made(times - width).gamma_B) / (2 * width)
    assert torch.allclose(made(times).slope_B, difference, rtol=1e-7)


TIMES = torch.tensor([0.05, 0.3, 0.55, 0.8], dtype=torch.float64)


def losses(made: NoiseSchedule) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of samples that depend on the level in a made-up way, and the report."""
    levels = made(TIMES)
    error = 0.3 + torch.sigmoid(levels.gamma_B) + 0.1 * levels.gamma_B.sin()
    return diffusion_term(error, levels.gamma_B, levels.slope_B), levels.report_B


def finite_difference(made: NoiseSchedule, name: str, function) -> torch.Tensor:
    parameter, width = dict(made.named_parameters())[name], 1e-5
    found = torch.zeros_like(parameter)
    for place in range(parameter.numel()):
        with torch.no_grad():
            parameter[place] += width
            above = function(losses(made)[0])
            parameter[place] -= 2 * width
            found[place] = (above - function(losses(made)[0])) / (2 * width)
            parameter[place] += width
    return found


def test_the_ends_minimise_the_bound_and_the_shape_its_variance():
    made, weights = schedule(), torch.tensor([0.5, 1.0, 2.0, 0.25], dtype=torch.float64)
    loss, report = losses(made)
    (3.0 * (report_loss(loss, report) * weights).mean()).backward()  # as accumulation scales the loss
    assert torch.allclose(
        made.ends.grad, 3 * finite_difference(made, "ends", lambda loss: (loss * weights).mean()), rtol=1e-6
    )
    for name in ("input_scale", "input_bias", "output_scale"):
        expected = 3 * SHAPE_GRADIENT * finite_difference(made, name, lambda loss: (loss.square() * weights).mean())
        found = dict(made.named_parameters())[name].grad
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-11), name
        assert found.norm() > 1e-3 * SHAPE_GRADIENT, name


def test_a_report_leaves_the_loss_and_its_own_gradient_alone():
    loss, report = torch.tensor([1.5, 2.5], requires_grad=True), torch.zeros(2, requires_grad=True)
    reported = report_loss(loss, report)
    assert torch.equal(reported, loss)
    (reported * torch.tensor([2.0, 7.0])).sum().backward()
    assert torch.equal(loss.grad, torch.tensor([2.0, 7.0]))
    assert torch.equal(report.grad, loss.detach())


def test_frozen_samples_give_the_schedule_no_gradient():
    made = schedule()
    levels = made(TIMES, torch.tensor([True, True, True, True]))
    loss = diffusion_term(torch.ones(4).double(), levels.gamma_B, levels.slope_B) + levels.gamma_end_B
    report_loss(loss, levels.report_B).sum().backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in made.parameters())


def test_gradient_steps_on_the_shape_even_out_the_loss():
    """The variance over t falls, and the bound, which no shape can change, stays."""
    made = schedule(32)
    times = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    optimizer = torch.optim.Adam([made.input_scale, made.input_bias, made.output_scale], 0.05)
    seen = []
    for _ in range(300):
        levels = made(times)
        loss = diffusion_term(torch.sigmoid(levels.gamma_B - 1), levels.gamma_B, levels.slope_B)
        seen.append((loss.mean().item(), loss.std().item()))
        optimizer.zero_grad()
        report_loss(loss, levels.report_B).mean().backward()
        optimizer.step()
    assert seen[-1][1] < 0.2 * seen[0][1]
    assert seen[-1][0] == pytest.approx(seen[0][0], rel=2e-3)


# ---- the categorical estimate ----


def test_the_estimate_is_the_mean_embedding_and_the_rest_the_cross_entropy():
    groups = initialize_parallel()
    embeddings, logits, z = (normal(*shape).float() for shape in ((7, 4), (5, 3, 7), (5, 3, 4)))
    tokens, everyone = torch.arange(15).view(5, 3) % 7, torch.ones(3)
    whole = with_output_prior(logits, z, embeddings, everyone, groups)
    assert torch.allclose(whole, logits + z @ embeddings.t())
    found = predict(whole, embeddings, tokens, everyone, groups)
    assert torch.allclose(found.estimate_SBC, whole.softmax(-1) @ embeddings, atol=1e-6)
    expected = F.cross_entropy(whole.flatten(0, 1), tokens.flatten(), reduction="none").view(5, 3)
    assert torch.allclose(found.nll_SB, expected, atol=1e-6)
    assert torch.equal(embeddings_of(tokens.t(), embeddings, groups), embeddings[tokens])


def test_some_samples_train_the_embeddings_and_all_train_the_rest():
    groups = initialize_parallel()
    embeddings, logits, z = (normal(*shape).requires_grad_() for shape in ((7, 4), (5, 3, 7), (5, 3, 4)))
    tokens = torch.arange(15).view(5, 3) % 7

    def gradients(trained: torch.Tensor, rows: slice) -> tuple[torch.Tensor, ...]:
        made = embeddings.float()
        whole = with_output_prior(logits.float(), z.float(), made, trained, groups)
        found = predict(whole, made, tokens, trained, groups)
        loss = (found.estimate_SBC.square().sum(-1) + found.nll_SB)[:, rows].sum()
        return torch.autograd.grad(loss, (embeddings, logits, z))

    some = gradients(torch.tensor([1.0, 0.0, 1.0]), slice(None))
    everyone, second = gradients(torch.ones(3), slice(None)), gradients(torch.ones(3), slice(1, 2))
    assert torch.allclose(some[0], everyone[0] - second[0], atol=1e-5) and second[0].norm() > 0.1
    assert torch.equal(some[1], everyone[1]) and torch.equal(some[2], everyone[2])


# ---- the bound, with the best denoiser there is ----

WORDS, LENGTH, CHANNELS, DRAWS = 3, 2, 2, 300_000
JOINT = torch.tensor([[0.30, 0.02, 0.03], [0.05, 0.25, 0.05], [0.10, 0.05, 0.15]], dtype=torch.float64)
ENTROPY = -(JOINT * JOINT.log()).sum().item()
# On a circle, unevenly: some words are harder to tell apart than others.
ANGLES = torch.tensor([0.0, 1.5, 3.5], dtype=torch.float64)
EMBEDDINGS = torch.stack((ANGLES.cos(), ANGLES.sin()), dim=-1)


def exact(z_SBC: torch.Tensor, gamma_B: torch.Tensor, joint: torch.Tensor = JOINT) -> Prediction:
    """E[x | z_t] by enumeration of all texts; under `nll` the log posterior of each word at each position."""
    scores_SBV = likelihood_scale(gamma_B)[:, None] * (z_SBC @ EMBEDDINGS.t())
    texts_BVV = joint.log() + scores_SBV[0, :, :, None] + scores_SBV[1, :, None, :]
    posterior_BVV = texts_BVV.flatten(1).softmax(-1).view_as(texts_BVV)
    marginals_SBV = torch.stack((posterior_BVV.sum(2), posterior_BVV.sum(1)))
    return Prediction(marginals_SBV @ EMBEDDINGS, -marginals_SBV.clamp(min=1e-300).log())


def bound(made: NoiseSchedule, denoiser=exact) -> tuple[float, float]:
    """-ELBO of the toy language in nats, and its standard error."""
    generator = torch.Generator().manual_seed(3)
    texts_B = torch.multinomial(JOINT.flatten(), DRAWS, replacement=True, generator=generator)
    tokens_SB = torch.stack((texts_B // WORDS, texts_B % WORDS))
    x_SBC = EMBEDDINGS[tokens_SB]

    def state(time_B: torch.Tensor):
        levels = made(time_B)
        noise_SBC = torch.randn(x_SBC.shape, generator=generator, dtype=torch.float64)
        return levels, denoiser(noisy_embeddings(x_SBC, noise_SBC, levels.gamma_B), levels.gamma_B)

    with torch.no_grad():
        _, at_zero = state(torch.zeros(DRAWS, dtype=torch.float64))
        times_B = (torch.randperm(DRAWS, generator=generator) + 0.5) / DRAWS
        levels, found = state(times_B.double())
        nll_SB = at_zero.nll_SB.gather(-1, tokens_SB[..., None])[..., 0]
        diffusion_SB = diffusion_term(squared_distance(x_SBC, found.estimate_SBC), levels.gamma_B, levels.slope_B)
        total_B = (nll_SB + prior_kl(x_SBC, levels.gamma_end_B) + diffusion_SB).sum(0)
    return total_B.mean().item(), total_B.std().item() / math.sqrt(DRAWS)


@pytest.mark.parametrize("ends", [(-5.0, 7.0), (-1.0, 3.0), (-4.0, 1.0)])
def test_no_bound_is_below_the_entropy_and_the_best_denoiser_reaches_it(ends):
    nats, error = bound(schedule(32, *ends))
    assert nats > ENTROPY - 4 * error
    if ends == (-5.0, 7.0):  # nothing is left to guess at the cleanest state, and nothing to see at the noisiest
        assert nats == pytest.approx(ENTROPY, abs=4 * error + 2e-3)
        assert error < 0.02
    else:
        assert nats > ENTROPY + 0.01


def test_a_denoiser_that_knows_each_word_alone_pays_for_what_they_share():
    """Its bound is the entropy of independent words: above the entropy by their mutual information."""
    alone = JOINT.sum(1, keepdim=True) * JOINT.sum(0, keepdim=True)
    information = (JOINT * (JOINT / alone).log()).sum().item()
    nats, error = bound(schedule(32, -5.0, 7.0), lambda z, gamma: exact(z, gamma, alone))
    assert nats == pytest.approx(ENTROPY + information, abs=4 * error + 2e-3)
    assert information > 10 * error


def test_the_bound_does_not_depend_on_the_shape_of_the_schedule():
    first, second = schedule(32), NoiseSchedule(32, -3.0, 6.0).double()
    initialize_parameters(second, 5, initialize_parallel())
    assert not torch.allclose(first(TIMES).gamma_B, second(TIMES).gamma_B, atol=0.1)
    (one, one_error), (other, other_error) = bound(first), bound(second)
    assert one == pytest.approx(other, abs=4 * math.hypot(one_error, other_error))


# ---- draws ----


def draws(batch_size: int, step: int, **objective: float) -> list[dict]:
    config = PlaidObjectiveConfig(**objective)
    first = step * batch_size
    return [plaid_draws(config, 66, batch_size, 16, 4, index, step) for index in range(first, first + batch_size)]


@pytest.mark.parametrize("batch_size", [2, 7, 32, 1408])
def test_the_times_of_a_global_batch_are_spread_evenly(batch_size):
    times = np.sort([spread_time(0.125, batch_size, place, 0.3) for place in range(batch_size)])
    at_zero = reconstruction_samples(0.125, batch_size)
    others = batch_size - at_zero
    assert (times[:at_zero] == 0).all()
    assert np.allclose(times[at_zero:], (np.arange(others) + 0.7) / others)


def test_every_micro_batch_has_early_and_late_times_and_its_share_of_first_estimates():
    batch = draws(1408, 3)
    for start in range(0, 1408, 32):
        times = np.sort([sample["time"] for sample in batch[start : start + 32]])
        assert np.diff([0.0, *times, 1.0]).max() < 0.15
        assert sum(sample["self_conditioned"] for sample in batch[start : start + 32]) == 8
    assert sum(sample["time"] == 0 for sample in batch) == 176


def test_draws_depend_on_sample_and_step_alone():
    one, again, next_step = draws(8, 2), draws(8, 2), draws(8, 3)
    for first, second in zip(one, again, strict=True):
        assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not np.array_equal(one[0]["noise"], one[1]["noise"])
    assert not np.array_equal(one[0]["noise"], next_step[0]["noise"])
    assert one[1]["time"] != next_step[1]["time"]


def test_the_output_prior_rises_and_samples_are_cut():
    assert [draws(2, step, output_prior_warmup_steps=4)[0]["output_prior"] for step in (0, 1, 3, 9)] == [
        0.25,
        0.5,
        1,
        1,
    ]
    assert draws(2, 0, output_prior_warmup_steps=0)[0]["output_prior"] == 1
    assert not any(sample["cut"] for sample in draws(64, 0, cut_share=0))
    assert all(0 < sample["cut"] < 16 for sample in draws(64, 0, cut_share=1))
