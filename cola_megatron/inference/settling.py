"""Adaptive steps: a block ends when the tokens of its estimate no longer change.

Before every step the straight line through z and its velocity ends at z - t v, an estimate of the clean block. It is
decoded after every `settle_every` steps; two looks in a row with the same tokens settle a sample, and the estimate of
the second is its block. What a sample answers depends on its own looks alone, whenever its neighbours settle.

Shapes: S latents of one block, B batch, N samples that have not settled, C latent channels, T tokens of one block.
"""

from collections.abc import Sequence

import torch


class Settling:
    """The looks at one block of a batch.

    Args:
        every: steps between two looks; 0: there are none.
        steps: of the solver; after the last one there is nothing to save.
    """

    def __init__(self, every: int, steps: int, batch: int):
        self.every, self.steps = every, steps
        self.left = list(range(batch))
        """Samples that have not settled, as rows of the batch."""
        self.taken = [steps] * batch
        """Steps that each sample's block takes."""
        self._seen: list[list[int] | None] = [None] * batch
        self._blocks: dict[int, torch.Tensor] = {}

    def due(self, step: int) -> bool:
        """Whether there is a look at the evaluation of this step, 0 the first."""
        return self.every > 0 and (step + 1) % self.every == 0 and step + 1 < self.steps

    def look(self, step: int, ids_NT: Sequence[list[int]], clean_SNC: torch.Tensor) -> list[int]:
        """Takes the tokens and estimates of the samples that are left; answers which of them settle."""
        settled = []
        for place, (row, ids) in enumerate(zip(self.left, ids_NT, strict=True)):
            if ids == self._seen[row]:
                self._blocks[row], self.taken[row] = clean_SNC[:, place], step + 1
                settled.append(row)
            self._seen[row] = ids
        self.left = [row for row in self.left if row not in settled]
        return settled

    def block(self, z_SBC: torch.Tensor | None) -> torch.Tensor:
        """The blocks of all samples, (S, B, C): where they settled, and else `z_SBC`, where the solver came to."""
        if z_SBC is None:
            return torch.stack([self._blocks[row] for row in range(len(self._blocks))], dim=1)
        return torch.stack([self._blocks.get(row, z_SC) for row, z_SC in enumerate(z_SBC.unbind(1))], dim=1)
