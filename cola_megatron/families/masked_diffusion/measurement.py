"""The bound of -log p(x) on held-out texts, at fixed draws: measurements and runs compare.

    bound = sum over blocks of  n/l sum_{i in M} -log p(x_i | x without M, blocks before),   l uniform on 1 .. n

Every text is masked `PASSES` times, each time at another level: the passes of a block lie in equal parts of [0, 1), and
over blocks and texts the levels fill each part evenly. So a mean over few hundred texts has little of the variance that
the levels alone would bring.

Shapes: B batch, W = PASSES * B views of it stacked along the batch, L tokens, N blocks, S positions of the network's
sequence, H hidden.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cola_megatron.config.masked_diffusion import MaskedDiffusionConfig
from cola_megatron.families.family import Measurement
from cola_megatron.families.masked_diffusion.chain import MaskedDiffusion
from cola_megatron.families.masked_diffusion.page import TIME_BINS
from cola_megatron.layers.embedding import token_cross_entropy
from cola_megatron.models.steps import Step
from cola_megatron.objectives.masked_diffusion import low_discrepancy, mask_in_order, number_to_mask, subset_weights
from cola_megatron.objectives.randomness import generator
from cola_megatron.parallel.sequence_parts import own_part, whole_sequence

PASSES = 4
"""Masks of every held-out text."""
FIXED_SEED = 0
"""Of levels and masks: not the run's, so that runs compare."""


class MaskedDiffusionMeasurement(Measurement):
    """The chain over the network of training, and the figures that follow from its sums."""

    batch_names = ("mask_level", "mask_order")

    def __init__(self, config: MaskedDiffusionConfig):
        self.config = config
        self.blocks = config.data.sequence_length // config.block_size

    def fixed_draws(self, samples: Sequence[int]) -> dict[str, NDArray[Any]]:
        """Draws for these held-out samples, by their number in the split.

        Returns:
            mask_level (B, PASSES, N), uniform on [0, 1); mask_order (B, PASSES, L): tokens are masked in its order.
        """
        return {
            "mask_level": np.stack([self._levels(sample) for sample in samples]),
            "mask_order": np.stack([self._order(sample) for sample in samples]),
        }

    def _levels(self, sample: int) -> NDArray[np.float64]:
        within = [low_discrepancy(0.5, sample * self.blocks + block) for block in range(self.blocks)]
        # Neighbouring blocks are in different parts, so that no pass masks all of a text alike.
        parts = (np.arange(PASSES)[:, None] + np.arange(self.blocks)[None, :]) % PASSES
        return (parts + np.array(within)[None, :]) / PASSES

    def _order(self, sample: int) -> NDArray[np.float32]:
        shape = (PASSES, self.config.data.sequence_length)
        return generator(FIXED_SEED, "held-out masking", sample, 0).random(shape, np.float32)

    def steps(self, model: MaskedDiffusion) -> list[Step]:
        """The chain. Names that begin with `sum_` are its results: sums over a micro-batch, each sample by `weight`."""
        by_document = self.config.data.document_attention
        documents = [Step("documents -> token_documents", lambda documents_BL: documents_BL)] if by_document else []
        return [
            *self._masking(),
            Step("tokens, masked -> network_tokens", model.noisy_tokens),
            *documents,
            *model.context_steps(by_document, views=PASSES),
            *model.network_steps(self._nll(model)),
            *self._sums(),
        ]

    def _masking(self) -> Iterator[Step]:
        blocks = self.blocks

        def masked(
            level_BWN: torch.Tensor, order_BWL: torch.Tensor, counted_BL: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            # The first pass of every sample, then the second of each: as the texts are repeated.
            level_WN, order_WL = (x.transpose(0, 1).flatten(0, 1) for x in (level_BWN, order_BWL))
            counted_WL = counted_BL.repeat(PASSES, 1)
            candidates_WN = counted_WL.unflatten(1, (blocks, -1)).sum(-1)
            masked_WL = mask_in_order(order_WL, counted_WL, number_to_mask(level_WN, candidates_WN))
            return masked_WL, subset_weights(masked_WL, counted_WL, blocks)

        yield Step("mask_level, mask_order, counted -> masked, mask_weight", masked)

    def _nll(self, model: MaskedDiffusion) -> Step:
        def nll(hidden_SWH: torch.Tensor, tokens_BL: torch.Tensor) -> torch.Tensor:
            # One pass after the other: the logits of all of them would take much memory.
            of_noisy_PWH, targets_PB = model.of_noisy_copy(hidden_SWH), own_part(tokens_BL.t(), model.groups)
            found = [
                token_cross_entropy(model.transformer.head(x_PBH), targets_PB)
                for x_PBH in of_noisy_PWH.chunk(PASSES, dim=1)
            ]
            return whole_sequence(torch.cat(found, dim=1), model.groups).t()

        return Step("hidden, tokens -> nll", nll)

    def _sums(self) -> Iterator[Step]:
        def of_samples(
            nll_WL: torch.Tensor, mask_weight_WL: torch.Tensor, counted_BL: torch.Tensor, weight_B: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            """Bound and tokens of all samples; and of nats per token of a sample: number, sum, sum of squares."""
            bound_B = (nll_WL.double() * mask_weight_WL).sum(1).unflatten(0, (PASSES, -1)).mean(0)
            tokens_B = counted_BL.double().sum(1)
            per_token_B = bound_B / tokens_B.clamp(min=1)
            spread = torch.stack((weight_B.sum(), per_token_B @ weight_B, per_token_B.square() @ weight_B))
            return bound_B @ weight_B, tokens_B @ weight_B, spread

        def by_time(nll_WL: torch.Tensor, mask_weight_WL: torch.Tensor, weight_B: torch.Tensor) -> torch.Tensor:
            """Cross-entropy of masked tokens and their number, (2, bins), by the masked share of their block."""
            masked_WL = mask_weight_WL > 0
            share_WL = torch.where(masked_WL, 1 / mask_weight_WL.clamp(min=1), 1.0)
            bin_WL = (share_WL * TIME_BINS - 1e-9).ceil().long().clamp(min=1) - 1  # 3 of 10 are in the third
            weight_WL = masked_WL * weight_B.repeat(PASSES)[:, None]
            zeros = torch.zeros(2, TIME_BINS, dtype=torch.float64, device=nll_WL.device)
            values = torch.stack((nll_WL.double() * weight_WL, weight_WL.double())).flatten(1)
            return zeros.index_add(1, bin_WL.flatten(), values)

        yield Step("nll, mask_weight, counted, weight -> sum_nll, sum_tokens, sum_spread", of_samples)
        yield Step("nll, mask_weight, weight -> sum_by_time", by_time)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of those results that are no scalars."""
        return {"sum_spread": (3,), "sum_by_time": (2, TIME_BINS)}

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """The figures that follow from the sums over the whole job.

        Returns:
            `nats_per_token`, an upper bound of -log p(x) per token, with its `_standard_error` over samples where there
            are two; `perplexity`, its exponential; `masked_nll_bin_<i>`: mean cross-entropy of masked tokens where so
            many of ten equal parts of the tokens are masked, for the parts that were met.
        """
        nats = sums["sum_nll"].item() / max(sums["sum_tokens"].item(), 1.0)
        found = {"nats_per_token": nats}
        count, total, squares = sums["sum_spread"].tolist()
        if count >= 2:
            variance = max(0.0, squares - total**2 / count) / (count - 1)
            found["nats_per_token_standard_error"] = math.sqrt(variance / count)
        found["perplexity"] = math.exp(min(nats, 700.0))
        for index, (nll, tokens) in enumerate(sums["sum_by_time"].t().tolist()):
            if tokens:
                found[f"masked_nll_bin_{index}"] = nll / tokens
        return found
