"""The velocity of all blocks of a text at once, each in the context of the clean blocks before it.

This is the training pass `[clean copy | noisy copy]` cut in two: the clean copy does not change while the noisy one is
integrated, so its keys and values are computed once.

Shapes: S latents of a text, B batch, C latent channels, N blocks, D = block_size * C coordinates of a block, A heads on
this rank, K head channels.
"""

import torch
from torch import nn

from cola_megatron.layers.attention import AttentionContext, attend
from cola_megatron.layers.masks import AttentionMask, two_copy_mask
from cola_megatron.models.dit import DiT, TimeTable


class CleanCopy:
    """Keys and values of the clean copy, layer by layer (`layers.attention.KeyValueStore`).

    The first pass of a layer is the clean copy's, block-causal; all others are the noisy copy's, where a block sees the
    clean blocks before its own and itself.

    Args:
        length: latents of the noisy copy; the clean one leaves out the last block, which nobody sees.
    """

    def __init__(self, length: int, block_size: int, device: torch.device):
        self.length = length - block_size
        visible = two_copy_mask(length, block_size, self.length, None, device).visible
        assert visible is not None, "the mask of two copies is never a plain one"
        self._of_clean = AttentionMask(visible[: self.length, : self.length])
        self._of_noisy = AttentionMask(visible[self.length :])
        self._kept: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(
        self, layer: nn.Module, q_SBAK: torch.Tensor, k_SBAK: torch.Tensor, v_SBAK: torch.Tensor
    ) -> torch.Tensor:
        """(S, B, A, K) -> (S, B, A * K)."""
        if not self.length:  # a single block has no context
            return attend(q_SBAK, k_SBAK, v_SBAK, self._of_noisy)
        if layer not in self._kept:
            self._kept[layer] = k_SBAK, v_SBAK
            return attend(q_SBAK, k_SBAK, v_SBAK, self._of_clean)
        clean_k, clean_v = self._kept[layer]
        return attend(q_SBAK, torch.cat((clean_k, k_SBAK)), torch.cat((clean_v, v_SBAK)), self._of_noisy)


class BlockFlow:
    """v(z^(b), t; z0^(<b)) of all blocks b, without guidance.

    Differentiable in z; parameters must not require gradients.

    Args:
        clean_SBC: z0, in the prior's coordinates; S divisible by the block size.
    """

    def __init__(self, dit: DiT, clean_SBC: torch.Tensor):
        self.dit, self.shape_SBC = dit, clean_SBC.shape
        self.device = clean_SBC.device
        self._clean = CleanCopy(clean_SBC.shape[0], dit.config.block_size, self.device)
        if self._clean.length:
            with torch.no_grad():
                dit(clean_SBC[: self._clean.length], self._at(0.0), self._context(self._clean.length))
        self._noisy = self._context(clean_SBC.shape[0])

    def __call__(self, z_BND: torch.Tensor, time: float) -> torch.Tensor:
        """(B, N, D) -> (B, N, D), float32."""
        z_SBC = z_BND.reshape(z_BND.shape[0], self.shape_SBC[0], -1).transpose(0, 1)
        return self.in_blocks(self.dit(z_SBC, self._at(time), self._noisy))

    def in_blocks(self, x_SBC: torch.Tensor) -> torch.Tensor:
        """(S, B, C) -> (B, N, D)."""
        return x_SBC.transpose(0, 1).unflatten(1, (-1, self.dit.config.block_size)).flatten(2)

    def _at(self, time: float) -> TimeTable:
        return TimeTable(torch.tensor([time], dtype=torch.float32, device=self.device), None)

    def _context(self, length: int) -> AttentionContext:
        return self.dit.context_at(torch.arange(length, device=self.device), AttentionMask(), self._clean)
