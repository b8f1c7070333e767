"""The losses: closed forms, gradient rules (by gradient), independence of the draws."""

import math

import numpy as np
import pytest
import torch

from cola_megatron.config import TimeConfig
from cola_megatron.families.cola.chain import Cola
from cola_megatron.families.cola.draws import sample_draws
from cola_megatron.families.cola.loss import flow_matching_term
from cola_megatron.models.steps import run_steps, steps_for
from cola_megatron.objectives import flow_matching, vae
from cola_megatron.objectives.randomness import draw_mask, draw_times, generator
from cola_megatron.objectives.vae import Posterior
from cola_megatron.parallel import initialize_parallel, initialize_parameters
from tests.support import perturbed, random_batch


def build(config) -> Cola:
    groups = initialize_parallel()
    model = Cola(config, groups)
    initialize_parameters(model, config.seed, groups)
    return perturbed(model)


def gradient_norm(loss: torch.Tensor, module: torch.nn.Module) -> float:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients if gradient is not None))


def test_kl_and_entropy_against_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, 5, 3, 4, generator=generator)
    reference = Posterior(*torch.randn(2, 5, 3, 4, generator=generator))
    posterior = Posterior(mean, logvar)

    def normal(p: Posterior) -> torch.distributions.Normal:
        return torch.distributions.Normal(p.mean, (0.5 * p.logvar).exp())

    standard, counted = torch.distributions.Normal(0.0, 1.0), torch.ones(5, 3, dtype=torch.bool)
    kl = torch.distributions.kl_divergence
    for ours, expected in (
        (vae.kl_to_standard_normal(posterior, counted, 2), kl(normal(posterior), standard).sum(-1).mean() / 2),
        (vae.negative_entropy(posterior, counted, 2), -normal(posterior).entropy().sum(-1).mean() / 2),
        (
            vae.kl_to_reference(posterior, reference, counted, 2),
            kl(normal(posterior), normal(reference)).sum(-1).mean() / 2,
        ),
    ):
        torch.testing.assert_close(ours, expected)


def test_flow_matching_reaches_the_encoder_through_z_t_only(tiny):
    """The clean context and the target are detached, z_t is not, but for clean prefixes."""
    config = tiny(2, "objective.flow.clean_prefix_probability=0.5", "objective.flow.time.per=sample")
    batch, z0 = random_batch(config, range(2)), torch.randn(32, 2, 4, requires_grad=True)
    velocity, copies = torch.randn(32, 2, 4, requires_grad=True), []

    class Prior:
        def two_copy_velocity(self, clean: torch.Tensor, noisy: torch.Tensor, *others: object) -> torch.Tensor:
            copies.extend((clean, noisy))
            return velocity

    loss = flow_matching_term(Prior(), z0, batch, config)
    clean, noisy = copies
    assert torch.equal(clean, z0[:24]) and not clean.requires_grad
    (through_zt,) = torch.autograd.grad(noisy.sum(), z0)
    expected = (1 - batch["time"].t()[..., None]) * ~batch["at_zero"].t()[..., None]
    torch.testing.assert_close(through_zt, expected.expand_as(z0))
    through_target, through_velocity = torch.autograd.grad(loss, (z0, velocity), allow_unused=True)
    assert through_target is None and through_velocity.abs().sum() > 0


def outcome(model: Cola, state: dict, name: str) -> torch.Tensor:
    """One name of the training pass, from what is given."""
    return run_steps(steps_for(model.steps(), [name], state), state)[name]


def flow_loss_with(model: Cola, batch: dict, latents: torch.Tensor) -> torch.Tensor:
    """The flow-matching loss as a function of the latents alone."""
    return outcome(model, {**batch, "latents": latents}, "loss_flow_matching")


def test_each_latent_is_reached_from_its_own_block_alone(tiny):
    """With t = 1 z_t forgets z0, so nothing may reach the encoder: neither context nor target carries gradient."""
    config = tiny(2, "objective.flow.clean_prefix_probability=0", "objective.flow.context_dropout=0")
    model, batch = build(config), random_batch(config, range(2))
    latents = torch.randn(32, 2, 4, requires_grad=True)
    batch["time"] = torch.ones_like(batch["time"])
    (gradient,) = torch.autograd.grad(flow_loss_with(model, batch, latents), latents)
    assert gradient.abs().max() == 0
    batch["time"][:, 1] = 0.5
    (gradient,) = torch.autograd.grad(flow_loss_with(model, batch, latents), latents)
    per_block = gradient.unflatten(0, (4, 8)).abs().sum((1, 2, 3))
    assert per_block[1] > 0
    assert per_block[[0, 2, 3]].max() == 0


def test_later_blocks_see_the_clean_context_and_no_block_sees_the_future(tiny):
    config = tiny(2, "objective.flow.clean_prefix_probability=0", "objective.flow.context_dropout=0.5")
    model, batch = build(config), random_batch(config, range(1))
    latents = torch.randn(32, 1, 4)

    def velocity(latents):
        return outcome(model, {**batch, "latents": latents}, "velocity")[-32:]

    # The noisy copy of block 1 forgets z0 at t = 1; what others see of it is its clean copy.
    batch["time"][:] = 1.0
    batch["context_dropped"][:] = False
    moved = latents.clone()
    moved[8:16] += 1.0
    changed = (velocity(moved) - velocity(latents)).unflatten(0, (4, 8)).abs().amax((1, 2, 3))
    assert changed[0] == 0 and changed[1] == 0
    assert changed[2] > 0 and changed[3] > 0
    batch["context_dropped"][:] = True
    assert (velocity(moved) - velocity(latents)).abs().max() == 0


def test_a_clean_prefix_carries_no_loss_and_no_gradient(tiny):
    config = tiny(2)
    model, batch = build(config), random_batch(config, range(2))
    batch["at_zero"][:] = False
    batch["at_zero"][:, 8:11] = True
    latents = torch.randn(32, 2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(flow_loss_with(model, batch, latents), latents)
    assert gradient[8:11].abs().max() == 0
    assert gradient[11:16].abs().min() > 0
    far_away = batch["flow_noise"].clone()
    far_away[:, 8:11] += 100.0
    assert torch.equal(
        flow_loss_with(model, batch, latents), flow_loss_with(model, {**batch, "flow_noise": far_away}, latents)
    )


def test_which_networks_each_term_trains(tiny):
    config = tiny(2, "training.vae_update.from_scratch=false")
    model, batch = build(config), random_batch(config, range(2))
    parts = {"encoder": model.vae.encoder, "decoder": model.vae.decoder, "dit": model.dit}

    def reached_from(name: str) -> list[str]:
        # The cross-entropy works in place: one backward pass for each forward pass.
        return [
            part for part, module in parts.items() if gradient_norm(run_steps(model.steps(), batch)[name], module) > 0
        ]

    names = [name for step in model.steps() for name in step.writes if name.startswith("loss_")]
    reaches = {name.removeprefix("loss_"): reached_from(name) for name in names}
    assert reaches == {
        "posterior": ["encoder"],
        "reference": ["encoder"],
        "flow_matching": ["encoder", "dit"],
        "reconstruction": ["encoder", "decoder"],
        "mask": ["encoder", "decoder"],
    }
    assert not any(parameter.requires_grad for parameter in model.reference.parameters())


def test_a_frozen_vae_is_left_out_of_the_graph(tiny):
    config = tiny(2, "training.vae_update.mode=interval")
    model, batch = build(config), random_batch(config, range(2))
    terms = model(batch, train_vae=False)
    assert set(terms) == {"loss", "flow_matching"}
    assert gradient_norm(terms["loss"], model.vae) == 0
    assert gradient_norm(terms["loss"], model.dit) > 0


def test_the_loss_is_the_weighted_sum_of_its_terms(tiny):
    config = tiny(
        2,
        "training.vae_update.from_scratch=false",
        "objective.vae_weight=0.7",
        "objective.vae.beta=0.3",
        "objective.vae.mask_weight=0.2",
        "objective.flow.weight=1.9",
        "objective.reference_weight=0.11",
    )
    terms = build(config)(random_batch(config, range(2)))
    expected = (
        0.7 * (terms["reconstruction"] + 0.3 * terms["posterior"] + 0.2 * terms["mask"])
        + 1.9 * terms["flow_matching"]
        + 0.11 * terms["reference"]
    )
    torch.testing.assert_close(terms["loss"].detach(), expected)


def test_posterior_term_follows_the_stage_unless_told(tiny):
    assert (tiny(1).posterior_term, tiny(2).posterior_term) == ("kl", "entropy")
    assert tiny(2, "objective.vae.posterior_term=kl").posterior_term == "kl"


@pytest.mark.parametrize("logsnr", [1.0, 2.0])
def test_a_fixed_logsnr_is_the_measured_one(tiny, logsnr):
    config = tiny(1, f"model.vae.fixed_logsnr={logsnr}")
    posterior = build(config).vae.encoder(random_batch(config, range(4))["tokens"])
    measured = vae.measured_logsnr(posterior.mean.square().mean().item(), posterior.logvar.exp().mean().item())
    assert measured == pytest.approx(logsnr, abs=1e-5)


def test_mask_loss_looks_at_masked_positions_of_the_second_view(tiny):
    config = tiny(1)
    batch = random_batch(config, range(4))
    assert (batch["masked"].sum(1) == round(0.15 * 32)).all()
    latents, mask = {}, batch["masked"]
    for name, tokens in (
        ("same", batch["tokens"]),
        ("other", torch.where(mask, (batch["tokens"] + 1) % 300, batch["tokens"])),
    ):
        model = build(config)
        latents[name] = outcome(model, {**batch, "tokens": tokens}, "latents")
    # The second view replaces the masked tokens, so its latents do not know them.
    assert torch.equal(latents["same"][:, 4:], latents["other"][:, 4:])
    assert not torch.equal(latents["same"][:, :4], latents["other"][:, :4])


@pytest.mark.parametrize("stage", [1, 2])
def test_the_mean_over_micro_batches_is_the_batch(tiny, stage):
    config = tiny(stage, "objective.flow.clean_prefix_probability=0.5")
    model = build(config)
    whole = model(random_batch(config, range(8)))
    parts = [model(random_batch(config, range(start, start + 2))) for start in range(0, 8, 2)]
    for name, value in whole.items():
        mean = torch.stack([part[name] for part in parts]).mean(0)
        torch.testing.assert_close(mean, value, rtol=1e-5, atol=1e-6)  # float32 sums in another order


def test_draws_depend_on_seed_purpose_sample_and_step_alone(tiny):
    config = tiny(2)
    first, again = sample_draws(config, 5, 7), sample_draws(config, 5, 7)
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
    for other in (sample_draws(config, 6, 7), sample_draws(config, 5, 8), sample_draws(tiny(2, "seed=67"), 5, 7)):
        assert not np.array_equal(first["flow_noise"], other["flow_noise"])
        assert not np.array_equal(first["posterior_noise"], other["posterior_noise"])
    assert not np.array_equal(first["flow_noise"].ravel()[:8], first["posterior_noise"].ravel()[:8])


def test_leaving_one_draw_out_changes_no_other(tiny):
    with_mask, without = sample_draws(tiny(2), 3, 1), sample_draws(tiny(2, "objective.vae.mask_weight=0"), 3, 1)
    np.testing.assert_array_equal(with_mask["flow_noise"], without["flow_noise"])
    np.testing.assert_array_equal(with_mask["posterior_noise"][:1], without["posterior_noise"])


def test_times_follow_their_distribution():
    count = 20_000
    t = draw_times(generator(1, "t", 0, 0), TimeConfig(loc=1.7, scale=0.5), count)
    logits = np.log(t / (1 - t))
    assert logits.mean() == pytest.approx(1.7, abs=0.02)  # four standard errors are 0.014
    assert logits.std() == pytest.approx(0.5, abs=0.02)
    uniform = draw_times(generator(1, "t", 0, 0), TimeConfig(distribution="uniform"), count)
    assert np.histogram(uniform, 10, (0, 1))[0] == pytest.approx(np.full(10, count / 10), rel=0.1)
    assert draw_times(generator(1, "t", 0, 0), TimeConfig(per="sample"), count).shape == (1,)


def test_mask_count_is_exact():
    assert [int(draw_mask(generator(1, "m", i, 0), 40, 0.15).sum()) for i in range(5)] == [6] * 5
    assert draw_mask(generator(1, "m", 0, 0), 40, 0.001).sum() == 1


def test_constant_predictor_is_the_variance():
    target = torch.randn(100, 3, generator=torch.Generator().manual_seed(0)).double() * 2 + 1
    ours = flow_matching.constant_predictor_loss(target.sum(0), target.square().sum().item(), 100)
    assert ours == pytest.approx(target.var(0, unbiased=False).mean().item())
