"""What the network sees of a noisy text: the text itself, or by blocks `[clean copy | noisy copy]`.

Shapes: B batch, L tokens, S positions of the network's sequence.
"""

from dataclasses import dataclass

import torch

from cola_megatron.errors import UserError
from cola_megatron.layers.attention import AttentionContext
from cola_megatron.layers.masks import AttentionMask, block_causal_mask, two_copies_in_chunks, two_copy_mask
from cola_megatron.layers.packed_documents import Kernel
from cola_megatron.models.transformer import Transformer


@dataclass(frozen=True)
class Copies:
    """The sequence of the network for texts of `length` tokens that are denoised in blocks of `block_size`.

    One block of the whole length is LLaDA: every position sees every other one, and there is no clean copy. Otherwise
    noisy block b sees itself and the clean blocks before it; the last clean block is seen by nobody and left out.
    """

    length: int
    block_size: int
    chunk: int = 0
    """Queries of one product of attention over both copies; see `layers.masks.two_copies_in_chunks`."""
    kernel: Kernel | None = None
    """Of attention inside documents, where there is no clean copy."""

    @property
    def clean_length(self) -> int:
        """Positions of the clean copy, before the noisy one."""
        return self.length - self.block_size

    def tokens(self, clean_BL: torch.Tensor, noisy_BL: torch.Tensor) -> torch.Tensor:
        """Token ids (B, S)."""
        return torch.cat((clean_BL[:, : self.clean_length], noisy_BL), dim=1) if self.clean_length else noisy_BL

    def mask(self, device: torch.device, documents_BL: torch.Tensor | None = None) -> AttentionMask:
        """Who sees whom; no position sees those of another document."""
        if self.clean_length:
            mask = two_copy_mask(self.length, self.block_size, self.clean_length, None, device, documents_BL)
            if not self.chunk:
                return mask
            return two_copies_in_chunks(mask, self.length, self.clean_length, self.block_size, self.chunk)
        return block_causal_mask(self.length, self.length, device, documents_BL, self.kernel)

    def context(
        self, transformer: Transformer, device: torch.device, documents_BL: torch.Tensor | None = None
    ) -> AttentionContext:
        """Attention of both copies, each from position 0 on."""
        positions = torch.arange(self.length, device=device)
        return transformer.context_at(
            torch.cat((positions[: self.clean_length], positions)), self.mask(device, documents_BL)
        )


def visible_positions(
    counted_BL: torch.Tensor, documents_BL: torch.Tensor, length_B1: torch.Tensor | None, by_document: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Which tokens count, and the documents that attention stays in; None: all see each other.

    Args:
        length_B1: a sample ends before this position: what follows does not count, and is seen by nobody that does.
    """
    if length_B1 is None:
        return counted_BL, documents_BL if by_document else None
    beyond_BL = torch.arange(counted_BL.shape[1], device=counted_BL.device) >= length_B1
    seen_BL = documents_BL if by_document else torch.zeros_like(documents_BL)
    return counted_BL & ~beyond_BL, seen_BL.masked_fill(beyond_BL, -2)  # padding is document -1


def require_no_mask_token(tokens_BL: torch.Tensor, mask_id: int) -> None:
    """Refuses texts that hold [MASK], where that is a token of the vocabulary; raises UserError.

    On a GPU this waits for the device.
    """
    if (tokens_BL == mask_id).any():
        raise UserError(
            f"a text holds token id {mask_id}, which is [MASK] to this model (model.mask_token_id); leave the token "
            "out of the texts, or train a new model with mask_token_id=null"
        )
