"""What a held-out measurement computes, as a chain over the same parts as training: any pipeline can run it.

Names that begin with `sum_` are sums over the counted positions of a micro-batch, each sample weighted by `weight`.
Shapes as in `models/cola.py`.
"""

from collections.abc import Iterator

import torch

from cola_megatron.config import RunConfig
from cola_megatron.layers.attention import AttentionContext
from cola_megatron.models.cola import Cola
from cola_megatron.models.dit import two_copy_times
from cola_megatron.models.steps import Step
from cola_megatron.objectives import flow_matching, vae
from cola_megatron.objectives.vae import Posterior
from cola_megatron.parallel.megatron import gather_from_tensor_model_parallel_region

ROBUSTNESS_TIMES = (0.0, 0.25, 0.5)
TIME_BINS = 10
"""Equal bins of t over [0, 1] for the flow-matching loss: their numbers are in the names of metrics."""


def measured_steps(model: Cola, config: RunConfig) -> list[Step]:
    """Posterior, reconstruction of latents at several flow times, and the velocity's error at two sets of times."""
    steps = [*model.position_steps(), *model.encoder_steps("tokens", gradient=False), *_of_the_posterior(model)]
    steps += model.reference_steps(train_vae=False)
    if model.dit is not None:
        steps += [*_two_passes(model, config), *model.flow_steps(), *_of_the_velocity(model)]
    return [*steps, *model.decoder_steps(_of_the_logits(model), views=len(ROBUSTNESS_TIMES))]


def _total(values_SB: torch.Tensor, counted_BS: torch.Tensor, weight_B: torch.Tensor) -> torch.Tensor:
    """Sum over counted positions and weighted samples, float64."""
    return (values_SB.double() * counted_BS.t()).sum(0) @ weight_B


def _of_the_posterior(model: Cola) -> Iterator[Step]:
    def noisy(mean_SBC: torch.Tensor, z1_SBC: torch.Tensor) -> torch.Tensor:
        mean_SBC = model.vae.to_prior(mean_SBC)
        return torch.cat([(1 - t) * mean_SBC + t * z1_SBC for t in ROBUSTNESS_TIMES], dim=1)

    def numbers(
        mean_SBC: torch.Tensor, counted_BL: torch.Tensor, counted_BS: torch.Tensor, weight_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return counted_BL.double().sum(1) @ weight_B, counted_BS.double().sum(1) @ weight_B

    def power(value_SBC: torch.Tensor, counted_BS: torch.Tensor, weight_B: torch.Tensor) -> torch.Tensor:
        return _total(value_SBC.double().sum(-1), counted_BS, weight_B)

    # Reads the mean so that one stage of a pipeline counts, not each of them.
    yield Step("mean, counted, counted_latents, weight -> sum_tokens, sum_latents", numbers)
    yield Step(
        "mean, counted_latents, weight -> sum_mean_square",
        lambda mean, counted, weight: power(mean.square(), counted, weight),
    )
    if model.config.model.vae.variational:
        yield Step(
            "logvar, counted_latents, weight -> sum_variance",
            lambda logvar, counted, weight: power(logvar.exp(), counted, weight),
        )
    yield Step("mean, flow_noise -> latents", noisy)


def _two_passes(model: Cola, config: RunConfig) -> Iterator[Step]:
    """The batch at the training distribution of t, and once more at uniform t."""
    dit, length, clean_length = model.dit, config.latent_length, model.clean_length
    assert dit is not None, "measured in stage 2 alone"
    blocks = length // config.model.dit.block_size

    def both(time_BN: torch.Tensor, uniform_BN: torch.Tensor) -> torch.Tensor:
        return torch.cat((time_BN.repeat_interleave(blocks // time_BN.shape[1], dim=1), uniform_BN))

    def sample(mean_SBC: torch.Tensor, logvar_SBC: torch.Tensor | None, noise_SBC: torch.Tensor) -> torch.Tensor:
        z0_SBC = model.vae.to_prior(vae.sample_posterior(Posterior(mean_SBC, logvar_SBC), noise_SBC))
        return z0_SBC.repeat(1, 2, 1)

    def noise(z0_SBC: torch.Tensor, z1_SBC: torch.Tensor, times_BN: torch.Tensor) -> torch.Tensor:
        t_SB = flow_matching.times_of_positions(times_BN, length)
        return torch.cat((z0_SBC[:clean_length], flow_matching.noisy_latents(z0_SBC, z1_SBC, t_SB)))

    def context(tokens_BL: torch.Tensor, documents_BS: torch.Tensor | None) -> AttentionContext:
        documents_BS = None if documents_BS is None else documents_BS.repeat(2, 1)
        return dit.two_copy_context(length, clean_length, None, tokens_BL.device, documents_BS)

    def table(times_BN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        times = two_copy_times(times_BN, length, clean_length, None)
        return times.times_T, dit.local_index(times.index_SB)

    yield Step("time, uniform_time -> both_times", both)
    yield Step("flow_noise -> z1", lambda z1_SBC: z1_SBC.repeat(1, 2, 1))
    yield Step("both_times -> distinct_times, time_index", table)
    yield Step("tokens, latent_documents -> flow_context", context)
    yield Step("mean, logvar, posterior_noise -> z0", sample)
    yield Step("z0, z1, both_times -> two_copies", noise)


def _of_the_velocity(model: Cola) -> Iterator[Step]:
    clean_length = model.clean_length

    def error(velocity: torch.Tensor, z0_SBC: torch.Tensor, z1_SBC: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return flow_matching.squared_error(velocity[clean_length:], z1_SBC - z0_SBC).double().chunk(2, dim=1)

    def target(
        z0_SBC: torch.Tensor, z1_SBC: torch.Tensor, counted_BS: torch.Tensor, weight_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        target_SBC = (z1_SBC - z0_SBC).chunk(2, dim=1)[0].double() * counted_BS.t()[..., None]
        return target_SBC.sum(0).t() @ weight_B, target_SBC.square().sum((0, 2)) @ weight_B

    def binned(
        error_SB: torch.Tensor, uniform_BN: torch.Tensor, counted_BS: torch.Tensor, weight_B: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        weight_SB = counted_BS.t() * weight_B
        by_block = (
            x_SB.unflatten(0, (uniform_BN.shape[1], -1)).sum(1).t() for x_SB in (error_SB * weight_SB, weight_SB)
        )
        bin_BN = (uniform_BN * TIME_BINS).long().clamp(max=TIME_BINS - 1).flatten()
        zeros = torch.zeros(TIME_BINS, dtype=torch.float64, device=error_SB.device)
        return tuple(zeros.index_add(0, bin_BN, x_BN.flatten()) for x_BN in by_block)

    yield Step("velocity, z0, z1 -> error, uniform_error", error)
    yield Step("error, counted_latents, weight -> sum_flow", _total)
    yield Step("z0, z1, counted_latents, weight -> sum_target, sum_target_square", target)
    yield Step("uniform_error, uniform_time, counted_latents, weight -> sum_bin_error, sum_bin_count", binned)


def _of_the_logits(model: Cola) -> Step:
    """Latents at each robustness time in turn: the logits of all of them at once would not fit."""
    groups, names = model.groups, [f"sum_correct_t{round(1000 * t)}" for t in ROBUSTNESS_TIMES]

    def count(
        hidden: torch.Tensor, tokens_BL: torch.Tensor, counted_BL: torch.Tensor, weight_B: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        correct: list[torch.Tensor] = []
        nll = torch.empty(0)
        for hidden_SBH in hidden.chunk(len(ROBUSTNESS_TIMES), dim=1):
            logits_TBV = model.vae.decoder.logits(hidden_SBH)
            if groups.tensor_parallel_size > 1:
                logits_TBV = gather_from_tensor_model_parallel_region(logits_TBV)
                logits_TBV = logits_TBV[..., : model.config.model.vocab_size]
            if not correct:
                nll_BT = torch.nn.functional.cross_entropy(
                    logits_TBV.permute(1, 2, 0).float(), tokens_BL, reduction="none"
                )
                nll = _total(nll_BT.t(), counted_BL, weight_B)
            correct.append(_total(logits_TBV.argmax(-1) == tokens_BL.t(), counted_BL, weight_B))
        return *correct, nll

    return Step(f"hidden, tokens, counted, weight -> {', '.join(names)}, sum_nll", count)
