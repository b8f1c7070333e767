"""The network in generation: hidden states of the blocks that are being unmasked.

Rows are sequences of token ids, with [MASK] where nothing is known yet: those of the samples and, for guidance, their
copies with a masked prompt. No row's numbers depend on another row: products of attention are taken per row, or per
group of rows of equal length.

Shapes: R rows, N positions of all rows laid end to end, T tokens of a row's block, S of a block of the model, H hidden.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from cola_megatron.inference.cached_attention import MaskedBlocks, NewBlocks, PackedPrompts, blocks_for, packs
from cola_megatron.inference.kv_cache import KeyValueCache
from cola_megatron.layers.masks import AttentionMask
from cola_megatron.models.transformer import Transformer

Rows = Sequence[torch.Tensor]
"""Token ids of each row, (L,)."""


class Passes(Protocol):
    """What a session asks of the network."""

    def hidden(self, rows: Rows, blocks: Sequence[slice]) -> list[torch.Tensor]:
        """What the head reads at the positions of each row's block, (T, H)."""

    def settle(self, rows: Rows, blocks: Sequence[slice]) -> None:
        """The blocks are unmasked and will not change."""

    def keep(self, rows: Sequence[int]) -> None:
        """Drops every row but these."""

    def admit(self, rows: Rows, starts: Sequence[int]) -> None:
        """Further rows behind the others, with the starts of their first blocks; tokens before those are clean."""

    def arrange(self, rows: Sequence[int]) -> None:
        """Puts all rows into this order."""


class WholeSequences:
    """Bidirectional: every pass runs over all of each row, laid end to end without padding."""

    def __init__(self, transformer: Transformer):
        self.transformer = transformer
        self.device = next(transformer.parameters()).device
        self._packed: dict[tuple[int, ...], PackedPrompts] = {}

    def hidden(self, rows: Rows, blocks: Sequence[slice]) -> list[torch.Tensor]:
        """See `Passes`."""
        found = []
        for members in packs([len(row) for row in rows]):
            lengths = tuple(len(rows[member]) for member in members)
            attention = self._attention(lengths)
            context = self.transformer.context_at(attention.positions, AttentionMask(), attention)
            tokens_1N = torch.cat([rows[member] for member in members])[None]
            x_N1H = self.transformer.run_blocks(self.transformer.embed(tokens_1N), context)
            parts = self.transformer.to_head(x_N1H)[:, 0].split(lengths)
            found += [x_LH[blocks[member]] for member, x_LH in zip(members, parts, strict=True)]
        return found

    def settle(self, rows: Rows, blocks: Sequence[slice]) -> None:
        """Nothing is kept between passes."""

    def keep(self, rows: Sequence[int]) -> None:
        """Nothing is kept between passes."""

    def admit(self, rows: Rows, starts: Sequence[int]) -> None:
        """Nothing is kept between passes."""

    def arrange(self, rows: Sequence[int]) -> None:
        """Nothing is kept between passes."""

    def _attention(self, lengths: tuple[int, ...]) -> PackedPrompts:
        if lengths not in self._packed:
            # One block over the longest row: every position of a row sees all of it.
            self._packed = {lengths: PackedPrompts(lengths, max(*lengths, 2), self.device)}
        return self._packed[lengths]


class CachedBlocks:
    """By blocks of the model: a pass runs over one block of each row, which sees the settled ones through a cache.

    It begins without rows; starts of blocks are multiples of `block_size`.
    """

    def __init__(self, transformer: Transformer, block_size: int):
        self.transformer, self.block_size = transformer, block_size
        self.device = next(transformer.parameters()).device
        self.cache = KeyValueCache()
        self._attention: NewBlocks | MaskedBlocks | None = None

    def admit(self, rows: Rows, starts: Sequence[int]) -> None:
        """See `Passes`: reads what is clean into the cache."""
        before, self._attention = len(self.cache.lengths), None
        self.cache.add(len(rows), max((len(row) for row in rows), default=0))
        for members in packs(starts):
            lengths, places = [starts[member] for member in members], [before + member for member in members]
            attention = PackedPrompts(lengths, self.block_size, self.device, self.cache, places)
            context = self.transformer.context_at(attention.positions, AttentionMask(), attention)
            tokens_1N = torch.cat([rows[member][: starts[member]] for member in members])[None]
            self.transformer.run_blocks(self.transformer.embed(tokens_1N), context)
        self.cache.advance([0] * before + list(starts))

    def hidden(self, rows: Rows, blocks: Sequence[slice]) -> list[torch.Tensor]:
        """See `Passes`."""
        return list(self.transformer.to_head(self._run(rows, blocks)).unbind(1))

    def settle(self, rows: Rows, blocks: Sequence[slice]) -> None:
        """Commits the blocks to the cache."""
        self._run(rows, blocks)
        self.cache.advance([self.block_size] * len(rows))
        self._attention = None

    def keep(self, rows: Sequence[int]) -> None:
        """Drops every row but these."""
        self.cache.keep(rows)
        self._attention = None

    def arrange(self, rows: Sequence[int]) -> None:
        """See `Passes`."""
        self.cache.arrange(rows)
        self._attention = None

    def _run(self, rows: Rows, blocks: Sequence[slice]) -> torch.Tensor:
        if self._attention is None:
            size = self.block_size
            self._attention = blocks_for(self.device)(self.cache, size, size, self.device)
        context = self.transformer.context_at(self._attention.positions_SB, AttentionMask(), self._attention)
        tokens_RS = torch.stack([row[block] for row, block in zip(rows, blocks, strict=True)])
        return self.transformer.run_blocks(self.transformer.embed(tokens_RS), context)
