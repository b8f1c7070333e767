"""log p(text | context) of a masked-diffusion model, estimated from below.

    log p >= sum over blocks of  E_l E_M  n/l sum_{i in M} log p(x_i | x without M, blocks before),   l ~ U{1 .. n}

n counts the text's own tokens of a block: the context is never masked. l is spread evenly over the draws of a text,
from one uniform start. Where each block has one token at most (blocks of one, or one token in all) there is nothing to
draw, and the bound is log p itself: the autoregressive factorisation.

Shapes: K draws, R rows of a pass, L tokens, N blocks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from cola_megatron.families.masked_diffusion.copies import Copies
from cola_megatron.families.masked_diffusion.settings import BoundSettings
from cola_megatron.inference.likelihood_terms import Kind, Progress, error_of_even_draws
from cola_megatron.inference.scored_texts import ScoredText
from cola_megatron.layers.embedding import token_cross_entropy
from cola_megatron.models.transformer import Transformer
from cola_megatron.objectives.masked_diffusion import mask_in_order, number_to_mask, subset_weights
from cola_megatron.objectives.randomness import generator


@dataclass(frozen=True)
class BoundedLikelihood:
    """A lower bound of log p(text | context), in nats. It is an `inference.likelihood_terms.TextLikelihood`."""

    figures: ClassVar[Mapping[str, str]] = {"elbo": "bound of log p"}
    bound_K: torch.Tensor
    """Each draw's estimate, float64; one where there is nothing to draw."""
    tokens: int
    """Of the text without its context; so are the next two."""
    text_bytes: int | None
    """UTF-8; None: token ids without a tokenizer."""
    text_words: int | None
    """Parted by white space."""
    exact: bool
    """There was nothing to draw."""

    @property
    def elbo(self) -> float:
        """Mean over the draws: a lower bound of log p in expectation."""
        return float(self.bound_K.mean())

    @property
    def elbo_error(self) -> float:
        """Standard error of `elbo` over the draws, whose levels are spread evenly; NaN for one draw."""
        return 0.0 if self.exact else error_of_even_draws(self.bound_K)

    @property
    def kind(self) -> Kind:
        """A bound, also after a context, which is never masked; exact where there was nothing to draw."""
        return "exact" if self.exact else "bound"

    @property
    def perplexity(self) -> float:
        """exp(-ELBO / tokens)."""
        return math.exp(-self.elbo / self.tokens)

    @property
    def bits_per_byte(self) -> float | None:
        """-ELBO / (bytes log 2)."""
        return -self.elbo / (self.text_bytes * math.log(2)) if self.text_bytes else None

    def as_json(self) -> dict[str, Any]:
        """The figures and, under `samples`, what they are means of."""
        names = ("elbo", "elbo_error", "tokens", "text_bytes", "text_words")
        return {**{name: getattr(self, name) for name in names}, "samples": {"bound": self.bound_K.tolist()}}


class Denoiser(Protocol):
    """What the bound asks of a model."""

    block_size: int | None
    """Tokens that are denoised together; None: all of a text."""
    mask_id: int

    def nll(self, clean_RL: torch.Tensor, noisy_RL: torch.Tensor) -> torch.Tensor:
        """-log p(clean token | what its position sees), float32 or float64, (R, L); at masked positions is enough.

        Each block sees its own noisy tokens and the clean ones of the blocks before it.
        """


class TransformerDenoiser:
    """A network as a `Denoiser`, on its own device."""

    def __init__(self, transformer: Transformer, block_size: int | None, mask_id: int):
        self.transformer, self.block_size, self.mask_id = transformer, block_size, mask_id

    def nll(self, clean_RL: torch.Tensor, noisy_RL: torch.Tensor) -> torch.Tensor:
        """See `Denoiser`."""
        transformer, length = self.transformer, clean_RL.shape[1]
        device = next(transformer.parameters()).device
        clean_RL, noisy_RL = clean_RL.to(device), noisy_RL.to(device)
        copies = Copies(length, length if self.block_size is None else self.block_size)
        x_SRH = transformer.embed(copies.tokens(clean_RL, noisy_RL))
        x_SRH = transformer.run_blocks(x_SRH, copies.context(transformer, device))
        of_noisy_LRH = transformer.to_head(x_SRH)[copies.clean_length :]
        # Row by row: the logits of all rows would take much memory.
        rows = zip(of_noisy_LRH.split(1, dim=1), clean_RL, strict=True)
        return torch.cat([token_cross_entropy(transformer.head(x_L1H), row_L[:, None]) for x_L1H, row_L in rows], 1).t()


@torch.no_grad()
def estimate(
    denoiser: Denoiser,
    texts: Sequence[ScoredText],
    settings: BoundSettings,
    batch_size: int,
    progress: Progress | None = None,
) -> list[BoundedLikelihood]:
    """One bound per text, in their order.

    Args:
        batch_size: draws of a text that are passed through the network at once; no result depends on it.

    Raises:
        ValueError: a text or a context holds [MASK].
    """
    found = []
    for text in texts:
        if denoiser.mask_id in (*text.context_ids, *text.token_ids):
            raise ValueError(f"a text holds token id {denoiser.mask_id}, which is [MASK] to this model")
        bound_K, exact = _bounds(denoiser, text, settings, batch_size)
        found.append(BoundedLikelihood(bound_K, len(text.token_ids), text.text_bytes, text.text_words, exact))
        if progress is not None:
            progress(len(found), len(texts))
    return found


def _bounds(
    denoiser: Denoiser, text: ScoredText, settings: BoundSettings, batch_size: int
) -> tuple[torch.Tensor, bool]:
    """Each draw's estimate of one text, (K,), float64; and whether there was nothing to draw, and K is 1."""
    ids = [*text.context_ids, *text.token_ids]
    block_size = len(ids) if denoiser.block_size is None else denoiser.block_size
    blocks = -(-len(ids) // block_size)
    # What a text leaves of its last block stays masked: training sees no shorter blocks, and nothing is said of it.
    clean_L = torch.tensor(ids + [denoiser.mask_id] * (blocks * block_size - len(ids)))
    candidates_L = torch.zeros(len(clean_L), dtype=torch.bool)
    candidates_L[len(text.context_ids) : len(ids)] = True
    beyond_L = torch.arange(len(clean_L)) >= len(ids)
    candidates_N = candidates_L.unflatten(0, (blocks, -1)).sum(-1)
    exact = bool(candidates_N.max() <= 1)
    draws = 1 if exact else settings.samples
    start_N = generator(settings.noise_seed, "masked likelihood level", text.sample_id % 2**54, 0).random(blocks)
    parts = []
    for first in range(0, draws, batch_size):
        rows = range(first, min(first + batch_size, draws))
        level_RN = torch.from_numpy((start_N + np.array(rows)[:, None] / draws) % 1.0)
        order_RL = torch.from_numpy(
            np.stack([_order(settings.noise_seed, text.sample_id, row, len(clean_L)) for row in rows])
        )
        candidates_RL, clean_RL = candidates_L.expand(len(rows), -1), clean_L.expand(len(rows), -1)
        masked_RL = mask_in_order(order_RL, candidates_RL, number_to_mask(level_RN, candidates_N.expand(len(rows), -1)))
        nll_RL = denoiser.nll(clean_RL, clean_RL.masked_fill(masked_RL | beyond_L, denoiser.mask_id)).double().cpu()
        weight_RL = subset_weights(masked_RL, candidates_RL, blocks)
        parts.append(-torch.where(masked_RL, nll_RL * weight_RL, 0.0).sum(1))
    return torch.cat(parts), exact


def _order(seed: int, sample_id: int, draw: int, length: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return generator(seed, "masked likelihood order", sample_id % 2**54, draw).random(length, np.float32)
