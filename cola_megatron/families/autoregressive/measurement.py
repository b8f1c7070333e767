"""The held-out measurement: the likelihood of the next token, which for this family is exact.

Shapes: B batch, L tokens, P of them in this rank's part of the sequence, S of these on this rank, H hidden, V
vocabulary, K moments.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from cola_megatron.families.autoregressive.chain import Autoregressive
from cola_megatron.families.family import Measurement
from cola_megatron.models.steps import Step
from cola_megatron.models.transformer_steps import whole_logits
from cola_megatron.parallel.sequence_parts import own_part, whole_sequence


class NextTokenMeasurement(Measurement):
    """-log p(x_(l+1) | x_1 .. x_l) and whether the most likely token is the right one, at every counted position."""

    @property
    def batch_names(self) -> Collection[str]:
        """Nothing is drawn."""
        return ()

    def fixed_draws(self, samples: Sequence[int]) -> dict[str, NDArray[Any]]:
        """Nothing is drawn."""
        return {}

    def steps(self, model: Autoregressive) -> list[Step]:
        """The chain of training up to the head, which here counts instead."""

        def count(
            hidden_SBH: torch.Tensor, targets_LB: torch.Tensor, counted_LB: torch.Tensor, weight_B: torch.Tensor
        ) -> torch.Tensor:
            logits_PBV, targets_PB = whole_logits(model.transformer, hidden_SBH), own_part(targets_LB, model.groups)
            nll_PB = F.cross_entropy(logits_PBV.flatten(0, 1).float(), targets_PB.flatten(), reduction="none")
            correct_PB = (logits_PBV.argmax(-1) == targets_PB).double()
            nll_LB, correct_LB = (
                whole_sequence(x_PB, model.groups) for x_PB in (nll_PB.view_as(targets_PB).double(), correct_PB)
            )
            nll_B, correct_B = ((x_LB * counted_LB).sum(0) for x_LB in (nll_LB, correct_LB))
            tokens_B = counted_LB.double().sum(0)
            moments_KB = torch.stack((torch.ones_like(tokens_B), tokens_B, nll_B, correct_B))
            return (moments_KB * weight_B) @ moments_KB.t()

        return list(model.network_steps(Step("hidden, targets, targets_counted, weight -> sum_moments", count)))

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Sums of products of any two of 1, tokens, nats and right predictions of a sample."""
        return {"sum_moments": (4, 4)}

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """`nats_per_token`, `next_token_accuracy`, `perplexity`, over all tokens alike.

        And the `_standard_error` over samples of the first two, as of a ratio of two means: samples are drawn, not
        their tokens.
        """
        moments_KK = sums["sum_moments"]
        samples, tokens = moments_KK[0, :2].tolist()
        if not tokens:
            return {}
        metrics = {}
        for row, name in ((2, "nats_per_token"), (3, "next_token_accuracy")):
            ratio = metrics[name] = moments_KK[0, row].item() / tokens
            if samples >= 2:
                of_ratio = torch.zeros_like(moments_KK[0])
                of_ratio[row], of_ratio[1] = (
                    1.0,
                    -ratio,
                )  # of each sample: its nats, less what its tokens lead to expect
                squares = max(0.0, (of_ratio @ moments_KK @ of_ratio).item())
                metrics[f"{name}_standard_error"] = math.sqrt(squares * samples / (samples - 1)) / tokens
        metrics["perplexity"] = perplexity(metrics["nats_per_token"])
        return metrics


def perplexity(nats_per_token: float) -> float:
    """exp of it; infinite where that is no number any more."""
    try:
        return math.exp(nats_per_token)
    except OverflowError:
        return math.inf
