"""Copies of what is about to change, in host memory that is kept for the next time."""

from collections.abc import Iterable
from itertools import chain

import torch

from cola_megatron.checkpoint.sharded_tensors import Piece, cut

BLOCK = 2**26
"""Float32 elements of a block of host memory: 256 MiB, because torch rounds pinned memory up to a power of two."""


class StagingBuffers:
    """Copies the values of pieces; on a GPU through pinned memory, which is where a device copies at full speed.

    Costs host memory for all that is copied, from the first call on: memory that is new must be brought in page by
    page, which takes longer than the copying.
    """

    def __init__(self, pinned: bool):
        self.pinned = pinned
        self._blocks: list[torch.Tensor] = []

    @torch.no_grad()
    def take(self, pieces: Iterable[Piece]) -> list[Piece]:
        """The pieces, cut small, with float32 copies as their values; the originals may change when it returns.

        The copies of the call before are overwritten.
        """
        parts = list(chain.from_iterable(map(cut, pieces)))
        missing, block, used, copies = sum(part.values.numel() for part in parts), 0, 0, []
        for part in parts:
            size = part.values.numel()
            if block < len(self._blocks) and used + size > len(self._blocks[block]):
                block, used = block + 1, 0
            if block == len(self._blocks):
                self._blocks.append(self._new(max(size, min(BLOCK, missing))))
            values = self._blocks[block].narrow(0, used, size).view(part.values.shape)
            values.copy_(part.values, non_blocking=True)
            copies.append(part._replace(values=values))
            used, missing = used + size, missing - size
        if self.pinned:
            torch.cuda.synchronize()
        return copies

    def _new(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.float32, pin_memory=self.pinned)
