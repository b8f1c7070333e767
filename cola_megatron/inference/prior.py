"""Guided sampling of one latent block after another from the DiT (paper section 2.3).

Shapes: S latents of one block, B batch, C latent channels, T times of the solver's grid.
"""

import torch

from cola_megatron.inference.kv_cache import KeyValueCache
from cola_megatron.inference.solvers import euler, uniform_grid
from cola_megatron.layers.masks import AttentionMask
from cola_megatron.models.dit import DiT, TimeTable


class BlockPrior:
    """Draws blocks z^(b) ~ p(z^(b) | z^(<b)) and remembers them.

    Args:
        capacity: latents per sample, prompt and generation together.
        steps: Euler steps on a uniform grid.
        guidance_scale: s in v = v_uncond + s (v_cond - v_uncond); the unconditional pass sees the block alone.
    """

    def __init__(self, dit: DiT, batch: int, capacity: int, steps: int, guidance_scale: float):
        self.dit, self.guidance_scale = dit, guidance_scale
        device = next(dit.parameters()).device
        self.block_size = dit.config.block_size
        self.cache = KeyValueCache(batch, capacity, device)
        self.times = uniform_grid(steps, device)
        # The modulations depend on the grid alone: row i is the i-th time, and the last row is t = 0.
        self.modulations = dit.modulations(self.times)
        self.clean_row = steps

    def remember(self, z_SBC: torch.Tensor, real_B: torch.Tensor | None = None) -> None:
        """Commits clean latents (t = 0) to the cache; `real_B` of them count where samples differ in length."""
        if z_SBC.shape[0] == 0:
            return
        positions, mask = self.cache.place(z_SBC.shape[0], self.block_size, real_B)
        rows_SB = torch.full(z_SBC.shape[:2], self.clean_row, device=z_SBC.device)
        self._velocity(z_SBC, rows_SB, self.dit.context_at(positions, mask, self.cache))
        self.cache.commit()

    def draw(self, noise_SBC: torch.Tensor, held_SB: torch.Tensor, clean_SBC: torch.Tensor) -> torch.Tensor:
        """One block by integrating from `noise`; positions in `held` stay at `clean` with t = 0 throughout."""
        scale_B = torch.where(self.cache.lengths_B > 0, self.guidance_scale, 1.0)
        positions, mask = self.cache.place(self.block_size, self.block_size)
        conditional = self.dit.context_at(positions, mask, self.cache)
        unconditional = self.dit.context_at(positions, AttentionMask())

        def velocity(z_SBC: torch.Tensor, step: int) -> torch.Tensor:
            rows_SB = torch.where(held_SB, self.clean_row, step)
            alone = self._velocity(z_SBC, rows_SB, unconditional)
            in_context = self._velocity(z_SBC, rows_SB, conditional)
            return alone + scale_B[:, None] * (in_context - alone)

        def hold(z_SBC: torch.Tensor) -> torch.Tensor:
            return torch.where(held_SB[..., None], clean_SBC, z_SBC)

        return euler(velocity, noise_SBC, self.times, hold)

    def _velocity(self, z_SBC: torch.Tensor, rows_SB: torch.Tensor, context) -> torch.Tensor:
        return self.dit(z_SBC, TimeTable(self.times, rows_SB), context, self.modulations)
