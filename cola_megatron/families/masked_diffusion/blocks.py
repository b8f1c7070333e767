"""The samples of a session, and the blocks of them that are being unmasked.

Shapes: L tokens of a sample, T of a block, V vocabulary.
"""

from dataclasses import dataclass

import torch


@dataclass
class Sample:
    """One running sample."""

    index: int
    """Of its request."""
    sample_id: int
    tokens_L: torch.Tensor
    """Prompt and new tokens, [MASK] where they are not settled; by blocks, up to the end of the last block."""
    prompt: int
    """Tokens of the prompt."""
    end: int
    """Of the last new token."""
    start: int
    """Of the block that is next."""
    blocks: int = 0
    """How many are settled."""
    seen_V: torch.Tensor | None = None
    """Which ids it has generated, where repetition is penalised."""


@dataclass
class Block:
    """The block of one sample that is being unmasked."""

    sample: Sample
    place: slice
    kept: list[int]
    """How many predictions each step keeps."""
    masked: int
    """Tokens that are still masked."""
    draws: torch.Generator
    """Of its tokens."""
    choice: torch.Generator
    """Of what is kept, where that is random."""

    @property
    def tokens_T(self) -> torch.Tensor:
        """A view of the sample's own."""
        return self.sample.tokens_L[self.place]

    @property
    def repeated(self) -> int:
        """Tokens of the block that belong to the prompt."""
        return max(0, self.sample.prompt - self.place.start)

    @property
    def stop(self) -> int:
        """Where its last token that was asked for ends, counted in the sample."""
        return min(self.place.stop, self.sample.end)


def schedule(masked: int, new: int, steps: int | None) -> list[int]:
    """How many predictions each step of a block keeps: as evenly as can be, the larger numbers first.

    Args:
        masked: tokens of the block that are masked.
        new: those of all blocks together.
        steps: for all blocks together, of which this one has its share, rounded up; None: one for each token.
    """
    own = masked if steps is None else min(masked, -(-steps * masked // new))
    each, more = divmod(masked, own)
    return [each + 1] * more + [each] * (own - more)
