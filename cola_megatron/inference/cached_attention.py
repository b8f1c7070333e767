"""Attention of inference: through a cache, over samples of different lengths, without padding.

Each class answers `attend` for all layers of one pass (`layers.attention.KeyValueStore`). They take a sample's product
over exactly the keys that it sees, so that its numbers do not depend on its neighbours. Only `MaskedBlocks` runs over
one common width under a mask: a GPU prefers that to many small products.

Shapes: S new positions, R rows of a pass (the B samples, then copies of some that see nothing but themselves), N
positions of all prompts laid end to end, A heads on this rank, G of keys and values, D head channels, K keys.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import nn

from cola_megatron.inference.kv_cache import KeyValueCache
from cola_megatron.layers.attention import attend, product
from cola_megatron.layers.masks import block_causal_mask, block_causal_visibility
from cola_megatron.layers.packed_documents import (
    PackedDocuments,
    attend_inside_documents,
    kernel_of_variable_lengths,
    starts_of,
)

# Prompts are laid end to end up to this many latents in one pass; more only takes memory for activations.
PACKED_LATENTS = 8192

# Masked products run over multiples of so many keys: a recorded or compiled step, and a kernel that plans for a shape,
# meets a new width every so many latents instead of at every block.
WIDTH = 256


def packs(lengths: Sequence[int], limit: int = PACKED_LATENTS) -> Iterator[list[int]]:
    """Indices of the prompts that have latents, in order, in packs of at most `limit` latents (or of one prompt)."""
    pack: list[int] = []
    total = 0
    for sample, length in enumerate(lengths):
        if pack and total + length > limit:
            yield pack
            pack, total = [], 0
        if length:
            pack.append(sample)
            total += length
    if pack:
        yield pack


class PackedPrompts:
    """Prompts laid end to end in one row, (N, 1): each sees itself, block-causally, from position 0.

    Args:
        lengths: latents of each prompt, at least one.
        cache: takes the keys and values, where they are wanted.
        samples: whose prompts these are, as rows of the cache.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        block_size: int,
        device: torch.device,
        cache: KeyValueCache | None = None,
        samples: Sequence[int] = (),
    ):
        self.lengths, self.cache, self.samples = lengths, cache, samples
        self.masks = {length: block_causal_mask(length, block_size, device) for length in set(lengths)}
        self.block_size = block_size
        self.starts_N: torch.Tensor | None = None
        self.positions = torch.cat([torch.arange(length) for length in lengths]).to(device)

    def attend(
        self, layer: nn.Module, q_NRAD: torch.Tensor, k_NRGD: torch.Tensor, v_NRGD: torch.Tensor
    ) -> torch.Tensor:
        """(N, 1, A, D) -> (N, 1, A * D)."""
        parts = [x.split(self.lengths) for x in (q_NRAD, k_NRGD, v_NRGD)]
        if self.cache is not None:
            keys, values = self.cache.of_layer(layer, k_NRGD.permute(1, 2, 0, 3))
            for sample, k, v in zip(self.samples, *parts[1:], strict=True):
                keys[sample, :, : len(k)] = k[:, 0].transpose(0, 1)
                values[sample, :, : len(v)] = v[:, 0].transpose(0, 1)
        kernel = kernel_of_variable_lengths(q_NRAD.device, q_NRAD.dtype)
        if kernel is not None and (self.block_size == 1 or self.block_size >= max(self.lengths)):
            if self.starts_N is None:
                self.starts_N = starts_of(self.lengths).to(q_NRAD.device)
            documents = PackedDocuments(self.starts_N, max(self.lengths), kernel)
            return attend_inside_documents(q_NRAD, k_NRGD, v_NRGD, documents, causal=self.block_size == 1)
        return torch.cat([attend(q, k, v, self.masks[len(q)]) for q, k, v in zip(*parts, strict=True)])


class _Group(NamedTuple):
    """Neighbouring samples of one length."""

    rows: slice
    """Of the pass."""
    cached: slice
    """The same samples' rows of the cache."""
    length: int
    visible_SK: torch.Tensor | None


class NewBlocks:
    """The next block of every sample: its queries see the sample's committed latents and the block itself.

    One product per group of neighbours of equal length, over slices of the cache: put samples in order of length.

    Args:
        size: positions of the block, S.
        block_size: of the stack's block-causal mask.
        samples: rows of the cache, ascending, that the pass has; None: all of them.
    """

    def __init__(
        self,
        cache: KeyValueCache,
        size: int,
        block_size: int,
        device: torch.device,
        samples: Sequence[int] | None = None,
    ):
        self.cache, self.size = cache, size
        samples = range(len(cache.lengths)) if samples is None else samples
        self.batch = len(samples)
        starts = torch.tensor([cache.lengths[sample] for sample in samples], dtype=torch.long)
        self.positions_SB = (starts + torch.arange(size)[:, None]).to(device)
        self.groups = []
        # Neighbours in the pass that are neighbours in the cache: there the difference of their places is the same.
        kinds = [(sample - place, cache.lengths[sample]) for place, sample in enumerate(samples)]
        row = 0
        for (apart, length), members in groupby(kinds):
            count = len(list(members))
            visible_SK = block_causal_visibility(
                torch.arange(length, length + size), torch.arange(length + size), block_size
            )
            seen_SK = None if visible_SK.all() else visible_SK.to(device)
            rows, cached = slice(row, row + count), slice(row + apart, row + apart + count)
            self.groups.append(_Group(rows, cached, length, seen_SK))
            row += count

    def attend(
        self, layer: nn.Module, q_SRAD: torch.Tensor, k_SRGD: torch.Tensor, v_SRGD: torch.Tensor
    ) -> torch.Tensor:
        """(S, R, A, D) -> (S, R, A * D). Rows beyond the samples see their own block alone."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SRAD, k_SRGD, v_SRGD))
        keys, values = self.cache.of_layer(layer, k)
        seen_SRAD = torch.empty(q_SRAD.shape, dtype=q.dtype, device=q.device)
        seen_RASD = seen_SRAD.permute(1, 2, 0, 3)
        for rows, cached, length, visible_SK in self.groups:
            end = length + self.size
            keys[cached, :, length:end] = k[rows]
            values[cached, :, length:end] = v[rows]
            seen_RASD[rows] = product(q[rows], keys[cached, :, :end], values[cached, :, :end], visible_SK)
        if len(q) > self.batch:
            alone = slice(self.batch, None)
            seen_RASD[alone] = product(q[alone], k[alone], v[alone])
        return seen_SRAD.flatten(2)


class MaskedBlocks:
    """`NewBlocks` in one product over a common width, that of the longest sample rounded up, under a mask."""

    def __init__(self, cache: KeyValueCache, size: int, block_size: int, device: torch.device):
        self.cache = cache
        self.width = min(-(-(max(cache.lengths, default=0) + size) // WIDTH) * WIDTH, cache.capacity)
        self.samples_B1 = torch.arange(len(cache.lengths), device=device)[:, None]
        starts_B = torch.tensor(cache.lengths, dtype=torch.long)
        positions_BS = starts_B[:, None] + torch.arange(size)
        keys_K = torch.arange(self.width)
        visible_BSK = block_causal_visibility(positions_BS, keys_K.expand(len(starts_B), -1), block_size)
        visible_BSK &= (keys_K < starts_B[:, None] + size)[:, None]
        self.positions_SB = positions_BS.t().to(device)
        self.visible_B1SK = visible_BSK[:, None].to(device)

    def attend(
        self, layer: nn.Module, q_SRAD: torch.Tensor, k_SRGD: torch.Tensor, v_SRGD: torch.Tensor
    ) -> torch.Tensor:
        """(S, R, A, D) -> (S, R, A * D). Rows beyond the samples see their own block alone."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SRAD, k_SRGD, v_SRGD))
        keys, values = self.cache.of_layer(layer, k)
        batch, positions_BS = len(self.samples_B1), self.positions_SB.t()
        keys[self.samples_B1, :, positions_BS] = k[:batch].transpose(1, 2)
        values[self.samples_B1, :, positions_BS] = v[:batch].transpose(1, 2)
        seen_RASD = product(q[:batch], keys[:, :, : self.width], values[:, :, : self.width], self.visible_B1SK)
        if len(q) > batch:
            seen_RASD = torch.cat((seen_RASD, product(q[batch:], k[batch:], v[batch:])))
        return seen_RASD.permute(2, 0, 1, 3).flatten(2)


def blocks_for(device: torch.device) -> type[NewBlocks] | type[MaskedBlocks]:
    """The form for a device: exact products per length on a CPU, one masked product on a GPU."""
    return NewBlocks if device.type == "cpu" else MaskedBlocks
