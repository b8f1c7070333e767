"""The noise of generation: a function of (seed, sample id, block) alone, as in the published package.

So a sample does not depend on the batch that it is drawn in. The published formula adds 1,000 for a sample and
10,000,000 for a block: sample 10,000 of block 0 has the noise of sample 0 of block 1. For more samples than that there
is `hashed`, in which no two are alike.
"""

import hashlib
from collections.abc import Iterable

import torch

# Added to the seed of a block's noise for its other draws, so that they are independent of it.
TOKEN_DRAWS, REPAINT_DRAWS = 5_000_000_000_000, 7_000_000_000_000
SHARED_AFTER = 10_000
"""So far apart are ids of which one has the noise of the other, a block later."""


def block_noise(
    seed: int, sample_id: int, block: int, shape: tuple[int, int], formula: str = "published"
) -> torch.Tensor:
    """Standard normal noise of one block: (S, C)."""
    return torch.randn(shape, generator=generator_of(seed, sample_id, block, formula=formula))


def generator_of(seed: int, sample_id: int, block: int, draws: int = 0, formula: str = "published") -> torch.Generator:
    """The stream of the noise of a block, or of its `TOKEN_DRAWS` or `REPAINT_DRAWS`.

    Args:
        formula: `published`, or `hashed`: seeded by a hash of all four.
    """
    if formula == "published":
        number = seed + sample_id * 1_000 + block * 10_000_000 + draws
    else:
        hashed = hashlib.sha256(f"{seed} {sample_id} {block} {draws}".encode()).digest()
        number = int.from_bytes(hashed[:8], "big") >> 1  # as a torch.Generator takes it
    return torch.Generator().manual_seed(number)


def share_noise(sample_ids: Iterable[int]) -> bool:
    """Whether a block of one of the samples has the noise of another's by the published formula."""
    known = set(sample_ids)
    return any(number + SHARED_AFTER in known for number in known)
