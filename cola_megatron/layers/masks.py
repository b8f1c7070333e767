"""The one mask concept: block-causal attention with block size b, and its two-copy form.

b = 1 is causal, b = length is bidirectional. The two-copy form lays `[clean copy | noisy copy]` in one sequence:
a clean query of block i sees clean blocks <= i; a noisy query of block i sees clean blocks < i and noisy block i
(paper section 2: V_b = {sg(z0^(<b)), zt^(b)}).
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionMask:
    """Who sees whom. `visible` is boolean, (S, K) or (B, 1, S, K); None with `causal` means a plain causal mask."""

    visible: torch.Tensor | None = None
    causal: bool = False


def block_causal_mask(
    length: int, block_size: int, device: torch.device, documents_BS: torch.Tensor | None = None
) -> AttentionMask:
    """Self-attention over one sequence of `length` positions.

    Args:
        documents_BS: which document each position belongs to; no position sees those of another.
    """
    if documents_BS is not None:
        positions = torch.arange(length, device=device)
        visible = block_causal_visibility(positions, positions, block_size)
        return AttentionMask((visible & _same(documents_BS, documents_BS))[:, None])
    if block_size == 1:
        return AttentionMask(causal=True)
    if block_size >= length:
        return AttentionMask()
    positions = torch.arange(length, device=device)
    return AttentionMask(block_causal_visibility(positions, positions, block_size))


def block_causal_visibility(
    query_positions: torch.Tensor, key_positions: torch.Tensor, block_size: int
) -> torch.Tensor:
    """(..., S) and (..., K) absolute positions -> boolean (..., S, K): key's block <= query's block."""
    return key_positions[..., None, :] // block_size <= query_positions[..., :, None] // block_size


def two_copy_mask(
    length: int,
    block_size: int,
    clean_length: int,
    context_dropped_BN: torch.Tensor | None = None,
    device: torch.device | None = None,
    documents_BL: torch.Tensor | None = None,
) -> AttentionMask:
    """Attention over `[clean copy | noisy copy]`, S = clean_length + length.

    Args:
        clean_length: positions of the clean copy that are carried: all `length`, or without the last block, which no
            noisy block sees.
        context_dropped_BN: boolean (B, blocks); True: that noisy block sees itself alone (trains the unconditional
            branch of guidance).
        documents_BL: which document each position belongs to; no position sees those of another.
    """
    block = torch.arange(length, device=device) // block_size
    clean = block[:clean_length]
    visible = torch.zeros(clean_length + length, clean_length + length, dtype=torch.bool, device=device)
    visible[:clean_length, :clean_length] = clean[None, :] <= clean[:, None]
    visible[clean_length:, :clean_length] = clean[None, :] < block[:, None]
    visible[clean_length:, clean_length:] = block[None, :] == block[:, None]
    if documents_BL is not None:
        documents_BS = torch.cat((documents_BL[:, :clean_length], documents_BL), dim=1)
        visible = visible & _same(documents_BS, documents_BS)
    elif context_dropped_BN is not None:
        visible = visible.repeat(context_dropped_BN.shape[0], 1, 1)
    else:
        return AttentionMask(visible)
    if context_dropped_BN is not None:
        dropped_BL = context_dropped_BN.repeat_interleave(block_size, dim=1)
        visible[:, clean_length:, :clean_length] &= ~dropped_BL[:, :, None]
    return AttentionMask(visible[:, None])


def _same(query_documents_BS: torch.Tensor, key_documents_BK: torch.Tensor) -> torch.Tensor:
    """Boolean (B, S, K): query and key are of one document."""
    return query_documents_BS[:, :, None] == key_documents_BK[:, None, :]
