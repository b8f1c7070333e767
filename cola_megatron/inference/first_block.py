"""The prompt that ends inside a block: the paper's four ways to begin (its research question 3).

The paper's scores, average over tasks: clean condition 24.6, right pad 16.7, left pad 16.0, partial repaint 7.5 to 9.3.

- `clean_condition`: the prompt's latents in the block stay clean throughout, and the network is told so: their time is
  0, whatever the solver's. The published package does this; training prepares for it with clean prefixes of blocks.
- `partial_repaint`: all of the block is at the solver's time. Before each evaluation at a time above
  `repaint_until` (t), the prompt's latents are put back, noised to that time: (1 - t) z0 + t z1 with the block's own
  noise z1. Each of these steps is done `repaint_rounds` (m) times; in between the block is noised back to the time
  where the step began. Below `repaint_until` the block runs free. The paper names t and m and does not define them
  further: this is the procedure of RePaint (arXiv 2201.09865) on the straight path of the flow.
- `left_pad`: padding tokens before the prompt fill its blocks, so that generation begins with a block of its own.
- `right_pad`: the same with padding after the prompt; the padding's latents are context.
  That padding is by the padding token, and that nothing hides it, is how we read the paper.

Shapes: S latents of one block, B batch, C latent channels, P tokens per latent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PromptLayout:
    """How a prompt stands before and in the first generated block."""

    token_ids: list[int]
    """What is encoded: the prompt and its padding."""
    whole: int
    """Latents before the first generated block, whole blocks."""
    held: int
    """Latents of the first generated block that belong to the prompt."""
    repeated_tokens: int
    """Tokens of the first generated block that repeat the prompt."""


def lay_out(
    prompt: Sequence[int], strategy: str, block_size: int, patch_size: int, encoder_unit: int, padding_id: int
) -> PromptLayout:
    """Pads a prompt and says what of it is context and what is held.

    Args:
        strategy: one of `settings.FIRST_BLOCKS`.
        encoder_unit: the encoder takes multiples of so many tokens.
    """
    prompt, block_tokens = list(prompt), block_size * patch_size
    if strategy in ("left_pad", "right_pad"):
        padding = [padding_id] * (-len(prompt) % block_tokens)
        padded = padding + prompt if strategy == "left_pad" else prompt + padding
        return PromptLayout(padded, len(padded) // patch_size, 0, 0)
    latents = math.ceil(len(prompt) / patch_size)
    whole = latents // block_size * block_size
    padded = prompt + [padding_id] * (-len(prompt) % encoder_unit)
    # A last patch may end in padding; it is held like the others, so fewer tokens than latents * P repeat the prompt.
    return PromptLayout(padded, whole, latents - whole, max(0, len(prompt) - whole * patch_size))


class FirstBlock:
    """The prompts' latents inside the first generated block, and what a solver's step does with them.

    Args:
        held_SB: boolean: latents that belong to a prompt.
        clean_SBC: their values; anything elsewhere.
        noise_SBC: what the block starts from.
        generators: one per sample, for noising back.
        repaint: partial repaint instead of the clean condition.
    """

    def __init__(
        self,
        held_SB: torch.Tensor,
        clean_SBC: torch.Tensor,
        noise_SBC: torch.Tensor,
        generators: Sequence[torch.Generator],
        repaint: bool = False,
        repaint_until: float = 0.0,
        repaint_rounds: int = 1,
    ):
        self.held_SB, self.clean_SBC, self.noise_SBC = held_SB, clean_SBC, noise_SBC
        self.generators, self.repaint = generators, repaint
        self.repaint_until, self.repaint_rounds = repaint_until, repaint_rounds

    def hold(self, z_SBC: torch.Tensor, time: float) -> torch.Tensor:
        """Puts the prompts' latents back, as they are at this time."""
        if not self.repaint:
            known_SBC = self.clean_SBC
        elif self._repaints(time):
            known_SBC = torch.lerp(self.clean_SBC, self.noise_SBC, time)
        else:
            return z_SBC
        return torch.where(self.held_SB[..., None], known_SBC, z_SBC)

    def time_rows(self, step: int, clean_row: int) -> torch.Tensor | None:
        """Which row of the table of times each position has, (S, B); None: all that of the step."""
        return None if self.repaint else torch.where(self.held_SB, clean_row, step)

    def rounds(self, time: float) -> int:
        """How often the step that begins at this time is done."""
        return self.repaint_rounds if self.repaint and self._repaints(time) else 1

    def noise_back(
        self, later_SBC: torch.Tensor, before_SBC: torch.Tensor, time: float, earlier: float
    ) -> torch.Tensor:
        """From the end of a step at `time` back to its beginning, `earlier` and noisier: a z + sqrt(s^2 - (a t)^2) eps.

        With t < s and a = (1 - s) / (1 - t), z_t = (1 - t) z0 + t z1 becomes (1 - s) z0 plus noise of variance s^2.
        A sample whose block holds nothing goes back to `before_SBC`, where it was.
        """
        shrink = (1 - earlier) / (1 - time)
        spread = math.sqrt(max(0.0, earlier**2 - (shrink * time) ** 2))
        size, _, channels = later_SBC.shape
        noise = [torch.randn((size, channels), generator=generator) for generator in self.generators]
        noised_SBC = later_SBC * shrink + torch.stack(noise, dim=1).to(later_SBC) * spread
        return torch.where(self.held_SB.any(0)[:, None], noised_SBC, before_SBC)

    def _repaints(self, time: float) -> bool:
        # At t = 0 nothing is evaluated any more; with repaint_until = 0 the prompt's latents are put back there too.
        return time > self.repaint_until or time == self.repaint_until == 0.0
