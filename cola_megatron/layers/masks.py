"""The one mask concept: block-causal attention with block size b, and its two-copy form.

b = 1 is causal, b = length is bidirectional. The two-copy form lays `[clean copy | noisy copy]` in one sequence:
a clean query of block i sees clean blocks <= i; a noisy query of block i sees clean blocks < i and noisy block i
(paper section 2: V_b = {sg(z0^(<b)), zt^(b)}).
"""

from dataclasses import dataclass, replace

import torch

from cola_megatron.layers.packed_documents import Kernel, PackedDocuments, pack_documents


@dataclass(frozen=True)
class QueryChunk:
    """Queries next to each other, and all the keys that any of them sees."""

    queries: slice
    keys: tuple[slice, ...]
    visible: torch.Tensor
    """Of these queries and keys, as in `AttentionMask`."""


@dataclass(frozen=True)
class AttentionMask:
    """Who sees whom. `visible` is boolean, (S, K) or (B, 1, S, K); None with `causal` means a plain causal mask."""

    visible: torch.Tensor | None = None
    causal: bool = False
    chunks: tuple[QueryChunk, ...] = ()
    """The same mask as products over fewer pairs, one for each chunk of the queries in order; empty: one product."""
    documents: PackedDocuments | None = None
    """Everybody sees their own document alone; under `causal` what of it is not later. There is no `visible` then."""


def block_causal_mask(
    length: int,
    block_size: int,
    device: torch.device,
    documents_BS: torch.Tensor | None = None,
    kernel: Kernel | None = None,
) -> AttentionMask:
    """Self-attention over one sequence of `length` positions.

    Args:
        documents_BS: which document each position belongs to, one behind the other; no position sees those of another.
        kernel: computes attention inside documents, causal or of all with all; other blocks keep a mask of all pairs.
    """
    if documents_BS is not None and kernel is not None and (block_size == 1 or block_size >= length):
        return AttentionMask(causal=block_size == 1, documents=pack_documents(documents_BS, kernel))
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


def two_copies_in_chunks(
    mask: AttentionMask, length: int, clean_length: int, block_size: int, size: int
) -> AttentionMask:
    """A `two_copy_mask` with its products over chunks of `size` queries, rounded up to whole blocks.

    A chunk of the clean copy sees clean keys up to its own end; one of the noisy copy the same and its own noisy keys.
    Half the queries or a quarter of them in a chunk leave about a half or three eighths of all pairs.
    """
    visible, size = mask.visible, -(-size // block_size) * block_size
    assert visible is not None, "a two-copy mask is never plainly causal"
    chunks = []
    for start in range(0, clean_length, size):
        end = min(start + size, clean_length)
        chunks.append(QueryChunk(slice(start, end), (slice(end),), visible[..., start:end, :end].contiguous()))
    for start in range(0, length, size):
        end = min(start + size, length)
        clean, own = slice(min(end, clean_length)), slice(clean_length + start, clean_length + end)
        seen = torch.cat((visible[..., own, clean], visible[..., own, own]), dim=-1)
        chunks.append(QueryChunk(own, (clean, own), seen))
    return replace(mask, chunks=tuple(chunks))


def _same(query_documents_BS: torch.Tensor, key_documents_BK: torch.Tensor) -> torch.Tensor:
    """Boolean (B, S, K): query and key are of one document."""
    return query_documents_BS[:, :, None] == key_documents_BK[:, None, :]
