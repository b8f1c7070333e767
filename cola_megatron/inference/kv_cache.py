"""Preallocated keys and values of a batch whose samples have different lengths.

Shapes: B batch, G heads of keys and values on this rank, D head channels, K capacity.
"""

from collections.abc import Hashable, Sequence

import torch


class KeyValueCache:
    """What the layers of one stack have seen so far, one store per layer.

    Samples fill their rows from the front. New keys and values are written behind a sample's length; `advance` makes
    them part of it. Until then the next pass overwrites them: the steps of a solver share one place and nothing is
    copied or concatenated.

    Args:
        capacity: latents per sample, the longest.
    """

    def __init__(self, batch: int, capacity: int):
        self.capacity = capacity
        self.lengths = [0] * batch
        """Committed latents of each sample. Kept on the host: asking the device would wait for it."""
        self._stores: dict[Hashable, tuple[torch.Tensor, torch.Tensor]] = {}

    def of_layer(self, layer: Hashable, like_BGSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, (B, G, K, D) each; `like_BGSD` gives heads, channels, type and device."""
        if layer not in self._stores:
            shape = (len(self.lengths), like_BGSD.shape[1], self.capacity, like_BGSD.shape[3])
            # Zeros: what a mask hides is multiplied by zero, which an arbitrary bit pattern would survive as NaN.
            self._stores[layer] = (like_BGSD.new_zeros(shape), like_BGSD.new_zeros(shape))
        return self._stores[layer]

    def advance(self, added: Sequence[int]) -> None:
        """Keeps `added` more latents of each sample."""
        self.lengths = [length + more for length, more in zip(self.lengths, added, strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        """Drops every sample but these, in ascending order, without a new allocation."""
        for layer, (keys, values) in self._stores.items():
            for place, row in enumerate(rows):
                if place != row:
                    keys[place, :, : self.lengths[row]] = keys[row, :, : self.lengths[row]]
                    values[place, :, : self.lengths[row]] = values[row, :, : self.lengths[row]]
            self._stores[layer] = (keys[: len(rows)], values[: len(rows)])
        self.lengths = [self.lengths[row] for row in rows]
