"""What one sample of a training step draws: times, masks and, for a few samples, a shorter length.

Shapes: L tokens, N blocks.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cola_megatron.config.masked_diffusion import MaskedDiffusionConfig
from cola_megatron.objectives.masked_diffusion import low_discrepancy, masking_times
from cola_megatron.objectives.randomness import generator


def sample_draws(config: MaskedDiffusionConfig, sample_index: int, step: int) -> dict[str, NDArray[Any]]:
    """Everything random that one sample needs in one step: a function of the seed, the sample and the step alone.

    Returns:
        time (N,): t of each block, in (min_time, 1]; N = 1 where the whole sequence is one;
        mask_uniform (L,): a token is masked where this lies below its t;
        length (1,): the sample ends before this position (absent where `random_length_share` is 0).
    """
    objective, length = config.objective, config.data.sequence_length
    blocks = length // config.block_size

    def stream(purpose: str, sample: int = sample_index) -> np.random.Generator:
        return generator(config.seed, purpose, sample, step)

    if objective.times == "low_discrepancy":
        offset = stream("masking time offset", 0).random()
        levels = np.array([low_discrepancy(offset, sample_index * blocks + block) for block in range(blocks)])
    else:
        levels = stream("masking time").random(blocks)
    draws: dict[str, NDArray[Any]] = {
        "time": masking_times(levels, objective.min_time),
        "mask_uniform": stream("masking").random(length, np.float32),
    }
    if objective.random_length_share > 0:
        random = stream("random length")
        is_cut = random.random() < objective.random_length_share
        draws["length"] = np.array([random.integers(1, length + 1) if is_cut else length])
    return draws
