"""The velocity of held-out latents, predicted several times over: with its context and without, at fixed times.

A prior that has learned something from the text before a block predicts its velocity better than one that sees the
block alone, and that one better than the best linear function of the noisy latent. To compare them they see the same
latents, the same noise and the same times, which are a function of the held-out set alone: `FIXED_TIMES` are equally
spaced, every block has one of them, and no run's own distribution of t takes part.

Shapes: S latents, B batch, W passes of it stacked along the batch, N blocks, C channels, M fixed times, K = 1 + 2 C.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cola_megatron.config import ColaConfig
from cola_megatron.families.cola.chain import Cola
from cola_megatron.layers.attention import AttentionContext
from cola_megatron.layers.time_embedding import TimeRows
from cola_megatron.models.dit import two_copy_times
from cola_megatron.models.steps import Step
from cola_megatron.objectives import flow_matching, vae
from cola_megatron.objectives.linear_denoiser import moment_matrix
from cola_megatron.objectives.randomness import draw_times, generator
from cola_megatron.objectives.vae import Posterior

TIME_BINS = 10
"""Equal bins of t over [0, 1]: their numbers are in the names of metrics."""
FIXED_TIMES = tuple((index + 0.5) / 20 for index in range(20))
"""Flow times of the comparison: the midpoints of 20 equal intervals, two in each bin."""
FIXED_SEED = 0
"""Of times and noise: not the run's, so that runs compare."""


class _Pass(NamedTuple):
    """One prediction of the whole batch."""

    name: str
    own_times: bool = False
    """At times of the training distribution instead of the fixed ones."""
    sees_context: bool = True
    context_shift: int = 0
    """By how many samples the clean copies are shifted along the batch: the context of another text."""


class Passes:
    """The steps that predict and compare, for one micro-batch.

    Args:
        shuffled_context: adds a pass in which every sample has the context of its neighbour in the micro-batch: a
            control, for what is gained from any context at all is not learned from the text.
    """

    def __init__(self, model: Cola, config: ColaConfig, shuffled_context: bool = False):
        self.model, self.config = model, config
        self.passes = [_Pass("training", own_times=True), _Pass("with"), _Pass("without", sees_context=False)]
        if shuffled_context and config.training.micro_batch_size > 1:
            self.passes.append(_Pass("shuffled", context_shift=1))

    def inputs(self) -> Iterator[Step]:
        """Posterior, noise and times -> two_copies, their times and context, for all passes at once."""
        model, dit, passes = self.model, self.model.prior, self.passes
        length, clean_length = self.config.latent_length, model.clean_length
        blocks = length // self.config.model.dit.block_size

        def times(time_BN: torch.Tensor, fixed_BN: torch.Tensor) -> torch.Tensor:
            own_BN = time_BN.repeat_interleave(blocks // time_BN.shape[1], dim=1)
            return torch.cat([own_BN if each.own_times else fixed_BN for each in passes])

        def sample(mean_SBC: torch.Tensor, logvar_SBC: torch.Tensor | None, noise_SBC: torch.Tensor) -> torch.Tensor:
            return model.vae.to_prior(vae.sample_posterior(Posterior(mean_SBC, logvar_SBC), noise_SBC))

        def two_copies(z0_SBC: torch.Tensor, z1_SBC: torch.Tensor, times_WN: torch.Tensor) -> torch.Tensor:
            clean_SWC = torch.cat([z0_SBC[:clean_length].roll(each.context_shift, dims=1) for each in passes], dim=1)
            z0_SWC, z1_SWC = z0_SBC.repeat(1, len(passes), 1), z1_SBC.repeat(1, len(passes), 1)
            t_SW = flow_matching.times_of_positions(times_WN, length)
            return torch.cat((clean_SWC, flow_matching.noisy_latents(z0_SWC, z1_SWC, t_SW)))

        def context(tokens_BL: torch.Tensor, documents_BS: torch.Tensor | None) -> AttentionContext:
            dropped_WN = torch.cat(
                [
                    tokens_BL.new_full((len(tokens_BL), blocks), not each.sees_context, dtype=torch.bool)
                    for each in passes
                ]
            )
            documents_WS = None if documents_BS is None else documents_BS.repeat(len(passes), 1)
            return dit.two_copy_context(length, clean_length, dropped_WN, tokens_BL.device, documents_WS)

        def table(times_WN: torch.Tensor) -> tuple[torch.Tensor, TimeRows | None]:
            found = two_copy_times(times_WN, length, clean_length, None)
            return found.times_T, dit.local_index(found.rows)

        yield Step("time, fixed_time -> all_times", times)
        yield Step("all_times -> distinct_times, time_index", table)
        yield Step("tokens, latent_documents -> flow_context", context)
        yield Step("mean, logvar, posterior_noise -> z0", sample)
        yield Step("z0, flow_noise, all_times -> two_copies", two_copies)

    def errors(self) -> Iterator[Step]:
        """velocity of all passes -> sums of their errors."""
        names, clean_length = [each.name for each in self.passes], self.model.clean_length

        def errors(velocity: torch.Tensor, z0_SBC: torch.Tensor, z1_SBC: torch.Tensor) -> tuple[torch.Tensor, ...]:
            u_SWC = (z1_SBC - z0_SBC).repeat(1, len(names), 1)
            return flow_matching.squared_error(velocity[clean_length:], u_SWC).double().chunk(len(names), dim=1)

        def moments(
            z0_SBC: torch.Tensor,
            z1_SBC: torch.Tensor,
            fixed_BN: torch.Tensor,
            counted_BS: torch.Tensor,
            weight_B: torch.Tensor,
        ) -> torch.Tensor:
            t_SB = flow_matching.times_of_positions(fixed_BN, len(z0_SBC))
            zt_SBC, u_SBC = flow_matching.noisy_latents(z0_SBC, z1_SBC, t_SB), z1_SBC - z0_SBC
            weight_SB, time_SB = counted_BS.t() * weight_B, time_index(t_SB)
            return torch.stack(
                [
                    moment_matrix(zt_SBC.flatten(0, 1), u_SBC.flatten(0, 1), (weight_SB * (time_SB == index)).flatten())
                    for index in range(len(FIXED_TIMES))
                ]
            )

        yield Step(f"velocity, z0, flow_noise -> {', '.join(f'error_{name}' for name in names)}", errors)
        yield Step("error_training, counted_latents, weight -> sum_error_training", total)
        for name in names[1:]:
            yield Step(f"error_{name}, fixed_time, counted_latents, weight -> sum_error_{name}", _by_time)
        yield Step("z0, flow_noise, fixed_time, counted_latents, weight -> sum_moments", moments)
        yield Step(
            "error_with, error_without, fixed_time, counted_latents, weight -> sum_samples, sum_spread",
            self._spread_over_samples,
        )

    def _spread_over_samples(
        self,
        with_SB: torch.Tensor,
        without_SB: torch.Tensor,
        fixed_BN: torch.Tensor,
        counted_BS: torch.Tensor,
        weight_B: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Number of samples; and over them the sums of loss, gain and information, and of their squares (6,)."""
        gain_SB = without_SB - with_SB
        t_SB = flow_matching.times_of_positions(fixed_BN, len(gain_SB))
        nats_SB = self.config.model.dit.latent_dim * gain_SB * (1 - t_SB) / t_SB
        counted_SB = counted_BS.t().double()
        of_samples = torch.stack(
            [(x_SB * counted_SB).sum(0) / counted_SB.sum(0).clamp(min=1) for x_SB in (with_SB, gain_SB, nats_SB)]
        )
        return weight_B.sum(), torch.cat((of_samples @ weight_B, of_samples.square() @ weight_B))


def fixed_draws(config: ColaConfig, samples: list[int]) -> dict[str, NDArray[np.float32]]:
    """What a measurement draws for these held-out samples, by their number in the split.

    Returns:
        flow_noise (S, B, C); in stage 2 also posterior_noise (S, B, C), fixed_time (B, N), and of the run's own law
        `time`, (B, N) or (B, 1).
    """
    latents, channels = config.latent_length, config.model.vae.latent_dim
    blocks = latents // config.model.dit.block_size

    def stream(purpose: str, sample: int) -> np.random.Generator:
        return generator(FIXED_SEED, f"held-out {purpose}", sample, 0)

    def normal(purpose: str) -> NDArray[np.float32]:
        each = [stream(purpose, sample).standard_normal((latents, channels), np.float32) for sample in samples]
        return np.stack(each, axis=1)

    def times(sample: int) -> NDArray[np.float32]:
        # In a new order for every sample, so that no time is tied to a place in the text.
        repeats = -(-blocks // len(FIXED_TIMES))
        order = np.concatenate([stream("times", sample).permutation(len(FIXED_TIMES)) for _ in range(repeats)])
        return np.array(FIXED_TIMES, dtype=np.float32)[order[:blocks]]

    if config.stage == 1:
        return {"flow_noise": normal("flow")}
    return {
        "flow_noise": normal("flow"),
        "posterior_noise": normal("posterior"),
        "fixed_time": np.stack([times(sample) for sample in samples]),
        "time": np.stack(
            [draw_times(stream("training times", sample), config.objective.flow.time, blocks) for sample in samples]
        ),
    }


def time_index(t: torch.Tensor) -> torch.Tensor:
    """Which of the fixed times each of these is."""
    return (t * len(FIXED_TIMES)).long().clamp(max=len(FIXED_TIMES) - 1)


def total(values_SB: torch.Tensor, counted_BS: torch.Tensor, weight_B: torch.Tensor) -> torch.Tensor:
    """Sum over counted positions and weighted samples, float64."""
    return (values_SB.double() * counted_BS.t()).sum(0) @ weight_B


def _by_time(
    error_SB: torch.Tensor, fixed_BN: torch.Tensor, counted_BS: torch.Tensor, weight_B: torch.Tensor
) -> torch.Tensor:
    """Sums at each fixed time, (M,)."""
    weight_SB, t_SB = counted_BS.t() * weight_B, flow_matching.times_of_positions(fixed_BN, len(error_SB))
    zeros_M = torch.zeros(len(FIXED_TIMES), dtype=torch.float64, device=error_SB.device)
    return zeros_M.index_add(0, time_index(t_SB).flatten(), (error_SB * weight_SB).flatten())
