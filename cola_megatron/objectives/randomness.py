"""Random draws of a training step, each a pure function of (seed, purpose, global sample index, step).

A counter-based generator (Philox) is keyed by the seed and the purpose, and its counter starts at the sample and the
step. No layout, micro-batch size, order of evaluation or resume can change a draw.
"""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cola_megatron.config import FlowConfig, TimeConfig


def generator(seed: int, purpose: str, sample_index: int, step: int) -> np.random.Generator:
    """The stream of draws for one purpose, sample and step."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}:{purpose}".encode(), digest_size=16).digest(), "little")
    # Philox counts up in the low words; sample and step sit in the high ones.
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, sample_index, step]))


def draw_mask(random: np.random.Generator, length: int, ratio: float) -> NDArray[Any]:
    """Exactly round(ratio * length), at least one, of `length` positions."""
    masked = np.zeros(length, dtype=bool)
    masked[random.permutation(length)[: max(1, round(ratio * length))]] = True
    return masked


def draw_times(random: np.random.Generator, config: TimeConfig, blocks: int) -> NDArray[Any]:
    """t = sigmoid(loc + scale n), or uniform; (blocks,) or (1,), float32 in [0, 1]."""
    count = blocks if config.per == "block" else 1
    if config.distribution == "uniform":
        return random.random(count, dtype=np.float32)
    normal = random.standard_normal(count)
    times: NDArray[Any] = 1.0 / (1.0 + np.exp(-(config.loc + config.scale * normal)))
    return times.astype(np.float32)


def draw_clean_prefixes(random: np.random.Generator, config: FlowConfig, blocks: int, block_size: int) -> NDArray[Any]:
    """Positions that a chosen block keeps clean: its first k latents, k uniform in 1 .. block_size - 1; (S,)."""
    if block_size == 1:
        return np.zeros(blocks, dtype=bool)  # a block of one latent has no proper prefix
    chosen = random.random(blocks) < config.clean_prefix_probability
    lengths = np.where(chosen, random.integers(1, block_size, size=blocks), 0)
    return (np.arange(block_size)[None, :] < lengths[:, None]).reshape(-1)
