"""Preallocated keys and values of a batch whose samples have different lengths.

Shapes: S new positions, B batch, A heads on this rank, D head channels, K capacity.
"""

import torch
from torch import nn

from cola_megatron.layers.masks import AttentionMask, block_causal_visibility


class KeyValueCache:
    """What the layers of one stack have seen so far.

    A forward pass writes its keys and values behind each sample's committed length. `commit` makes them part of it;
    without `commit` the next pass overwrites them. So the steps of a solver share one place, and nothing is copied.

    Args:
        capacity: latents per sample, the longest.
    """

    def __init__(self, batch: int, capacity: int, device: torch.device):
        self.lengths_B = torch.zeros(batch, dtype=torch.long, device=device)
        self.capacity = capacity
        self.key_positions_K = torch.arange(capacity, device=device)
        self.stores: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
        self.positions_SB: torch.Tensor | None = None
        self.added_B: torch.Tensor | None = None
        self.visible_until = self.longest = 0

    def place(
        self, new: int, block_size: int, real_B: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, AttentionMask]:
        """Where `new` positions of every sample stand, and what they see; call it before a pass.

        Args:
            real_B: how many of the new positions are real in each sample (a ragged prefix: at least one sample fills
                it); the others are written but never seen, and `commit` leaves them out.

        Returns:
            positions (S, B) and a block-causal mask over the cache.
        """
        offsets_S = torch.arange(new, device=self.lengths_B.device)
        self.positions_SB = self.lengths_B[None, :] + offsets_S[:, None]
        self.visible_until = self.longest + new  # counted here: asking the device would wait for it
        self.added_B = torch.full_like(self.lengths_B, new) if real_B is None else real_B
        keys_K = self.key_positions_K[: self.visible_until]
        visible_BSK = block_causal_visibility(
            self.positions_SB.t(), keys_K[None].expand(len(self.lengths_B), -1), block_size
        )
        visible_BSK &= (keys_K < (self.lengths_B + self.added_B)[:, None])[:, None]
        # A padded query of a ragged prefix must see something; what it computes is never read.
        visible_BSK |= self.positions_SB.t()[..., None] == keys_K
        return self.positions_SB, AttentionMask(visible_BSK[:, None])

    def commit(self) -> None:
        """Keeps what the last pass wrote."""
        self.lengths_B = self.lengths_B + self.added_B
        self.longest = self.visible_until

    def extend(self, layer: nn.Module, k_SBAD: torch.Tensor, v_SBAD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes one layer's new keys and values and returns all that may be seen, (K, B, A, D)."""
        if layer not in self.stores:
            shape = (self.capacity, *k_SBAD.shape[1:])
            self.stores[layer] = (k_SBAD.new_zeros(shape), v_SBAD.new_zeros(shape))
        keys, values = self.stores[layer]
        samples_B = torch.arange(k_SBAD.shape[1], device=k_SBAD.device)
        keys[self.positions_SB, samples_B] = k_SBAD
        values[self.positions_SB, samples_B] = v_SBAD
        return keys[: self.visible_until], values[: self.visible_until]
