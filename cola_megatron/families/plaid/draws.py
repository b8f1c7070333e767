"""Random draws of Plaid's training, each a function of (seed, sample index, step) alone.

The times of a global batch are spread evenly (low discrepancy): of its N samples the first R in a scattered order are
at t = 0 and estimate the reconstruction, and the k-th of the others is at t = (k + u) / (N - R), with one u in (0, 1]
for the step. As published, but for the order, by which every micro-batch has times from the whole interval and which
begins at another sample in each step, and for R, which is fixed.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cola_megatron.config.plaid import PlaidObjectiveConfig
from cola_megatron.objectives.randomness import generator

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def plaid_draws(
    objective: PlaidObjectiveConfig,
    seed: int,
    global_batch_size: int,
    length: int,
    channels: int,
    sample_index: int,
    step: int,
) -> dict[str, NDArray[Any]]:
    """Everything random that one sample needs in one step, and what follows from the step.

    Returns:
        noise (L, C): standard normal; time (), float64: 0 for the reconstruction, else in (0, 1];
        self_conditioned (), bool; cut (), int64: the sample is two texts that part before this position, 0 for one;
        output_prior (), float32: weight of log p(z_t | token) in the logits.
    """
    of_sample, place = (sample_index, step), sample_index % global_batch_size
    of_step = generator(seed, "plaid step", 0, step)
    shift, offset, begin = of_step.random(), of_step.random(), int(of_step.integers(global_batch_size))
    cut = generator(seed, "plaid cut", *of_sample)
    is_cut, position = cut.random() < objective.cut_share, cut.integers(1, max(2, length))
    warmup = objective.output_prior_warmup_steps
    return {
        "noise": generator(seed, "plaid noise", *of_sample).standard_normal((length, channels), np.float32),
        "time": np.float64(spread_time(objective.reconstruction_share, global_batch_size, place + begin, shift)),
        "self_conditioned": np.bool_(every(objective.self_conditioning, place, offset)),
        "cut": np.int64(position if is_cut and length > 1 else 0),
        "output_prior": np.float32(min(1.0, (step + 1) / warmup) if warmup else 1.0),
    }


def spread_time(reconstruction_share: float, global_batch_size: int, place: int, shift: float) -> float:
    """The time of one sample of a global batch.

    Args:
        place: of the sample in its global batch, counted from where the step begins.
        shift: in [0, 1), the same for the whole batch.
    """
    rank = place * _stride(global_batch_size) % global_batch_size
    first = reconstruction_samples(reconstruction_share, global_batch_size)
    return 0.0 if rank < first else (rank - first + 1 - shift) / (global_batch_size - first)


def reconstruction_samples(reconstruction_share: float, global_batch_size: int) -> int:
    """How many samples of a global batch are at t = 0: at least one, and not all."""
    return min(max(1, round(reconstruction_share * global_batch_size)), global_batch_size - 1)


def every(share: float, place: int, offset: float) -> bool:
    """Whether a place is chosen, where a share of all is, as evenly as can be.

    Args:
        offset: in [0, 1): with which of them it begins.
    """
    return math.floor(share * (place + 1) + offset) > math.floor(share * place + offset)


def _stride(size: int) -> int:
    """A step through 0 .. size - 1 that meets each once and leaves no gap for long."""
    stride = max(1, round(GOLDEN_RATIO * size))
    while math.gcd(stride, size) > 1:
        stride += 1
    return stride
