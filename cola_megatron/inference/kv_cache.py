"""Preallocated keys and values of a batch whose samples have different lengths.

Shapes: B batch, G heads of keys and values on this rank, D head channels, K capacity.
"""

from collections.abc import Hashable, Sequence

import torch


class KeyValueCache:
    """What the layers of one stack have seen so far, one store per layer.

    Samples fill their rows from the front. New keys and values are written behind a sample's length; `advance` makes
    them part of it. Until then the next pass overwrites them: the steps of a solver share one place and nothing is
    copied or concatenated. Samples leave by `keep` and come by `add`; the stores stay where they are as long as there
    were once as many samples, and as long ones.
    """

    def __init__(self) -> None:
        self.slots = self.capacity = 0
        """Samples and latents per sample that the stores have room for."""
        self.allocations = 0
        """How often stores were made: until the next time they stand at the same addresses."""
        self.lengths: list[int] = []
        """Committed latents of each sample. Kept on the host: asking the device would wait for it."""
        self._stores: dict[Hashable, tuple[torch.Tensor, torch.Tensor]] = {}
        self._views: dict[Hashable, tuple[torch.Tensor, torch.Tensor]] = {}

    def of_layer(self, layer: Hashable, like_BGSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, (B, G, K, D) each; `like_BGSD` gives heads, channels, type and device."""
        if layer not in self._views:
            if layer not in self._stores:
                shape = (self.slots, like_BGSD.shape[1], self.capacity, like_BGSD.shape[3])
                # Zeros: what a mask hides is multiplied by zero, which an arbitrary bit pattern would survive as NaN.
                self._stores[layer] = (like_BGSD.new_zeros(shape), like_BGSD.new_zeros(shape))
            keys, values = self._stores[layer]
            self._views[layer] = keys[: len(self.lengths)], values[: len(self.lengths)]
        return self._views[layer]

    def advance(self, added: Sequence[int]) -> None:
        """Keeps `added` more latents of each sample."""
        self.lengths = [length + more for length, more in zip(self.lengths, added, strict=True)]

    def add(self, samples: int, capacity: int) -> None:
        """Further samples behind the others, without latents yet; none will have more than `capacity` of them."""
        rows, self._views = len(self.lengths), {}
        if rows + samples > self.slots or capacity > self.capacity:
            self.slots, self.capacity = max(self.slots, rows + samples), max(self.capacity, capacity)
            self.allocations += 1
            longest = max(self.lengths, default=0)
            self._stores = {layer: self._grown(pair, rows, longest) for layer, pair in self._stores.items()}
        self.lengths += [0] * samples

    def keep(self, rows: Sequence[int]) -> None:
        """Drops every sample but these, in ascending order."""
        self._views = {}
        for pair in self._stores.values():
            for store in pair:
                for place, row in enumerate(rows):
                    if place != row:
                        store[place, :, : self.lengths[row]] = store[row, :, : self.lengths[row]]
        self.lengths = [self.lengths[row] for row in rows]

    def arrange(self, rows: Sequence[int]) -> None:
        """Puts all samples into this order."""
        longest = max(self.lengths, default=0)
        for pair in self._stores.values():
            for store in pair:
                store[: len(rows), :, :longest] = store[list(rows), :, :longest]
        self.lengths = [self.lengths[row] for row in rows]

    def _grown(
        self, pair: tuple[torch.Tensor, torch.Tensor], rows: int, longest: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        grown = []
        for store in pair:
            grown.append(store.new_zeros(self.slots, store.shape[1], self.capacity, store.shape[3]))
            grown[-1][:rows, :, :longest] = store[:rows, :, :longest]
        keys, values = grown
        return keys, values
