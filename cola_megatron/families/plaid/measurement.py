"""Held-out bound of Plaid: its three terms in nats per token, at times and noises of the held-out samples alone.

Every sample is in 1 + T rows: at t = 0 for the reconstruction, and at T times for the diffusion term, one of each T-th
of [0, 1]. As in generation, a model with self-conditioning is told its first estimate in every row.

Shapes: B samples, W = (1 + T) B rows (all at t = 0 first, then all at the earliest times), L tokens, S the same where
they come first, C channels, K moments.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cola_megatron.config.plaid import PlaidConfig
from cola_megatron.families.family import Measurement
from cola_megatron.families.plaid.chain import Plaid
from cola_megatron.models.steps import Step
from cola_megatron.objectives.plaid import diffusion_term, prior_kl
from cola_megatron.objectives.randomness import generator

FIXED_SEED = 0
"""Of times and noise: not the run's, so that runs compare."""
TIMES = 4
"""T."""
TERMS = ("reconstruction", "prior", "diffusion")
LARGEST_EXPONENT = 700.0
"""exp of more is no float any more."""


class PlaidMeasurement(Measurement):
    """The chain of a held-out measurement, and the figures that follow from its sums."""

    def __init__(self, config: PlaidConfig):
        self.config = config

    @property
    def batch_names(self) -> Collection[str]:
        """Names of the micro-batch beside tokens, counted, documents and weight."""
        return {"noise", "time"}

    def fixed_draws(self, samples: Sequence[int]) -> dict[str, NDArray[Any]]:
        """noise (B, 1 + T, L, C) and time (B, T) of these held-out samples, by their number in the split."""
        shape = (1 + TIMES, self.config.data.sequence_length, self.config.model.diffusion.embedding_dim)
        noise = [
            generator(FIXED_SEED, "held-out plaid noise", sample, 0).standard_normal(shape, np.float32)
            for sample in samples
        ]
        shifts = [generator(FIXED_SEED, "held-out plaid time", sample, 0).random() for sample in samples]
        return {"noise": np.stack(noise), "time": (np.arange(TIMES) + np.array(shifts)[:, None]) / TIMES}

    def steps(self, model: Plaid) -> list[Step]:
        """The networks of training, over rows of its own."""
        told = self.config.objective.self_conditioning > 0

        def rows(
            tokens_BL: torch.Tensor, documents_BL: torch.Tensor, noise_BvLC: torch.Tensor, time_BT: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            time_W = torch.cat((torch.zeros_like(time_BT[:, :1]), time_BT), dim=1).t().flatten()
            return (
                tokens_BL.repeat(1 + TIMES, 1),
                documents_BL.repeat(1 + TIMES, 1),
                noise_BvLC.transpose(0, 1).flatten(0, 1),
                time_W,
                torch.full_like(time_W, told, dtype=torch.bool),
                torch.ones_like(time_W, dtype=torch.float32),
                torch.zeros_like(time_W, dtype=torch.long),
            )

        names = ("tokens", "documents", "noise", "time", "self_conditioned", "output_prior", "cut")
        return [
            Step(f"tokens, documents, noise, time -> {', '.join(f'rows_{name}' for name in names)}", rows),
            *model.noise_steps("rows_"),
            *model.network_steps("rows_"),
            Step("nll, distance, x, gamma, slope, gamma_end, counted, weight -> sum_moments", _moments),
        ]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Sums of products of any two of 1, tokens and the three terms of a sample."""
        return {"sum_moments": (5, 5)}

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """`nats_per_token` (an upper bound), its `perplexity`, and its terms: `reconstruction_nats_per_token`, ...

        And the `_standard_error` over samples of the bound, the reconstruction and the diffusion term, as of a ratio of
        two means. The prior's term is the same for every token, since all embeddings have one length.
        """
        moments_KK = sums["sum_moments"]
        samples, tokens = moments_KK[0, :2].tolist()
        if not tokens:
            return {}
        metrics = {}
        for prefix, rows in (("", TERMS), *((f"{term}_", (term,)) for term in TERMS)):
            nats_K = torch.zeros_like(moments_KK[0])
            nats_K[[2 + TERMS.index(term) for term in rows]] = 1.0
            ratio = metrics[f"{prefix}nats_per_token"] = (moments_KK[0] @ nats_K).item() / tokens
            if samples >= 2 and rows != ("prior",):
                nats_K[1] = -ratio  # of each sample: its nats, less what its tokens lead to expect
                squares = max(0.0, (nats_K @ moments_KK @ nats_K).item())
                error = math.sqrt(squares * samples / (samples - 1)) / tokens
                metrics[f"{prefix}nats_per_token_standard_error"] = error
        bound = metrics["nats_per_token"]
        return {**metrics, "perplexity": math.exp(bound) if bound < LARGEST_EXPONENT else math.inf}


def _moments(
    nll_SW: torch.Tensor,
    distance_SW: torch.Tensor,
    x_SWC: torch.Tensor,
    gamma_W: torch.Tensor,
    slope_W: torch.Tensor,
    gamma_end_W: torch.Tensor,
    counted_BL: torch.Tensor,
    weight_B: torch.Tensor,
) -> torch.Tensor:
    counted_SB, samples = counted_BL.t().double(), len(counted_BL)
    terms = (
        nll_SW[:, :samples].double(),
        prior_kl(x_SWC[:, :samples], gamma_end_W[:samples]),
        diffusion_term(distance_SW, gamma_W, slope_W)[:, samples:].unflatten(1, (TIMES, samples)).mean(1),
    )
    tokens_B = counted_SB.sum(0)
    of_terms = [(term_SB * counted_SB).sum(0) for term_SB in terms]
    moments_KB = torch.stack((torch.ones_like(tokens_B), tokens_B, *of_terms))
    return (moments_KB * weight_B) @ moments_KB.t()
