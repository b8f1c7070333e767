"""The noise of generation: a function of (seed, sample id, block) alone, as in the published package.

So a sample does not depend on the batch that it is drawn in. The published formula adds 1,000 for a sample and
10,000,000 for a block: sample 10,000 of block 0 has the noise of sample 0 of block 1.
"""

import torch

# Added to the seed of a block's noise for its other draws, so that they are independent of it.
TOKEN_DRAWS, REPAINT_DRAWS = 5_000_000_000_000, 7_000_000_000_000


def block_noise(seed: int, sample_id: int, block: int, shape: tuple[int, int]) -> torch.Tensor:
    """Standard normal noise of one block: (S, C)."""
    return torch.randn(shape, generator=generator_of(seed, sample_id, block))


def generator_of(seed: int, sample_id: int, block: int, draws: int = 0) -> torch.Generator:
    """The stream of the noise of a block, or of its `TOKEN_DRAWS` or `REPAINT_DRAWS`."""
    return torch.Generator().manual_seed(seed + sample_id * 1_000 + block * 10_000_000 + draws)
