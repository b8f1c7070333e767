"""Held-out bound of Plaid: its three terms in nats per token, at times and noises of the held-out samples alone.

Every sample is in two rows: at t = 0 for the reconstruction, and at a time for the diffusion term. The times of the
samples 0, 1, 2, ... are multiples of the golden ratio modulo 1, so that any number of them is spread evenly. As in
generation, a model with self-conditioning is told its first estimate in every row.

Shapes: B samples, W = 2 B rows (all at t = 0 first), L tokens, S the same where they come first, C channels, K moments.
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
from cola_megatron.families.plaid.draws import GOLDEN_RATIO
from cola_megatron.models.steps import Step
from cola_megatron.objectives.plaid import diffusion_term, prior_kl
from cola_megatron.objectives.randomness import generator

FIXED_SEED = 0
"""Of the noise: not the run's, so that runs compare."""
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
        diffusion_term(distance_SW, gamma_W, slope_W)[:, samples:],
    )
    tokens_B = counted_SB.sum(0)
    of_terms = [(term_SB * counted_SB).sum(0) for term_SB in terms]
    moments_KB = torch.stack((torch.ones_like(tokens_B), tokens_B, *of_terms))
    return (moments_KB * weight_B) @ moments_KB.t()
