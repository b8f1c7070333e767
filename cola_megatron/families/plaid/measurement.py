"""Held-out bound of Plaid: its three terms in nats per token, at times and noises of the held-out samples alone.

Every sample is in two rows: at t = 0 for the reconstruction, and at a time for the diffusion term. The times of the
samples 0, 1, 2, ... are multiples of the golden ratio modulo 1, so that any number of them is spread evenly. As in
generation, a model with self-conditioning is told its first estimate in every row.

Shapes: B samples, W = 2 B rows (all at t = 0 first), L tokens, S the same where they come first, C channels.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cola_megatron.config.plaid import PlaidConfig
from cola_megatron.families.plaid.chain import Plaid
from cola_megatron.families.plaid.draws import GOLDEN_RATIO
from cola_megatron.models.steps import Step
from cola_megatron.objectives.plaid import diffusion_term, prior_kl
from cola_megatron.objectives.randomness import generator

FIXED_SEED = 0
"""Of the noise: not the run's, so that runs compare."""


class PlaidMeasurement:
    """The chain of a held-out measurement, and the figures that follow from its sums."""

    def __init__(self, config: PlaidConfig):
        self.config = config

    @property
    def batch_names(self) -> set[str]:
        """Names of the micro-batch beside tokens, counted, documents and weight."""
        return {"noise", "time"}

    def fixed_draws(self, samples: Sequence[int]) -> dict[str, NDArray[Any]]:
        """noise (B, 2, L, C) and time (B,) of these held-out samples, by their number in the split."""
        shape = (2, self.config.data.sequence_length, self.config.model.diffusion.embedding_dim)
        noise = [
            generator(FIXED_SEED, "held-out plaid noise", sample, 0).standard_normal(shape, np.float32)
            for sample in samples
        ]
        return {"noise": np.stack(noise), "time": (np.array(samples, dtype=np.float64) + 0.5) * GOLDEN_RATIO % 1.0}

    def steps(self, model: Plaid) -> list[Step]:
        """The networks of training, over rows of its own."""
        told = self.config.objective.self_conditioning > 0

        def rows(
            tokens_BL: torch.Tensor, documents_BL: torch.Tensor, noise_B2LC: torch.Tensor, time_B: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            count = 2 * len(time_B)
            return (
                tokens_BL.repeat(2, 1),
                documents_BL.repeat(2, 1),
                noise_B2LC.transpose(0, 1).flatten(0, 1),
                torch.cat((torch.zeros_like(time_B), time_B)),
                torch.full((count,), told, device=time_B.device),
                torch.ones(count, device=time_B.device),
                torch.zeros(count, dtype=torch.long, device=time_B.device),
            )

        names = ("tokens", "documents", "noise", "time", "self_conditioned", "output_prior", "cut")
        results = ("tokens", "reconstruction", "prior", "diffusion", "spread")
        return [
            Step(f"tokens, documents, noise, time -> {', '.join(f'rows_{name}' for name in names)}", rows),
            *model.noise_steps("rows_"),
            *model.network_steps("rows_"),
            Step(
                f"nll, distance, x, gamma, slope, gamma_end, counted, weight -> "
                f"{', '.join(f'sum_{name}' for name in results)}",
                _sums,
            ),
        ]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the sums that are no scalars."""
        return {"sum_spread": (4,)}

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """`nats_per_token` (an upper bound, with a `_standard_error`), its `perplexity`, and its three terms."""
        tokens = sums["sum_tokens"].item()
        terms = {name: sums[f"sum_{name}"].item() / tokens for name in ("reconstruction", "prior", "diffusion")}
        bound = sum(terms.values())
        metrics = {"nats_per_token": bound, "perplexity": math.exp(bound)}
        count, squares, products, square_tokens = sums["sum_spread"].tolist()
        if count >= 2:
            # Of a ratio of two means: the spread of sum - ratio * tokens over the samples.
            residual = max(0.0, squares - 2 * bound * products + bound**2 * square_tokens)
            metrics["nats_per_token_standard_error"] = math.sqrt(residual * count / (count - 1)) / tokens
        return {**metrics, **{f"{name}_nats_per_token": value for name, value in terms.items()}}


def _sums(
    nll_SW: torch.Tensor,
    distance_SW: torch.Tensor,
    x_SWC: torch.Tensor,
    gamma_W: torch.Tensor,
    slope_W: torch.Tensor,
    gamma_end_W: torch.Tensor,
    counted_BL: torch.Tensor,
    weight_B: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    counted_SB, samples = counted_BL.t().double(), len(counted_BL)
    tokens_B = counted_SB.sum(0)
    terms = (
        nll_SW[:, :samples].double(),
        prior_kl(x_SWC[:, :samples], gamma_end_W[:samples]),
        diffusion_term(distance_SW, gamma_W, slope_W)[:, samples:],
    )
    terms_3B = torch.stack([(term_SB * counted_SB).sum(0) for term_SB in terms])
    bound_B = terms_3B.sum(0)
    spread = (torch.ones_like(bound_B), bound_B.square(), bound_B * tokens_B, tokens_B.square())
    return tokens_B @ weight_B, *(terms_3B @ weight_B), torch.stack(spread) @ weight_B
