"""Everything random that Cola DLM needs of one sample in one step."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cola_megatron.config import ColaConfig
from cola_megatron.objectives.randomness import draw_clean_prefixes, draw_mask, draw_times, generator


def sample_draws(config: ColaConfig, sample_index: int, step: int) -> dict[str, NDArray[Any]]:
    """Everything random that one sample needs in one step.

    Returns:
        posterior_noise (views, S, C): one standard normal per view of the sample;
        masked (L,): positions of the second view that become [MASK] (absent without a mask loss);
        and in stage 2: flow_noise (S, C), time (blocks,) or (1,) in [0, 1], at_zero (S,), context_dropped (blocks,).
    """

    def stream(purpose: str) -> np.random.Generator:
        return generator(config.seed, purpose, sample_index, step)

    latents, channels = config.latent_length, config.model.vae.latent_dim
    has_mask_view = config.objective.vae.mask_weight > 0
    draws: dict[str, NDArray[Any]] = {
        "posterior_noise": stream("posterior").standard_normal((1 + has_mask_view, latents, channels), np.float32)
    }
    if has_mask_view:
        draws["masked"] = draw_mask(stream("mask"), config.data.sequence_length, config.objective.vae.mask_ratio)
    if config.stage == 2:
        flow, block_size = config.objective.flow, config.model.dit.block_size
        blocks = latents // block_size
        draws["flow_noise"] = stream("flow").standard_normal((latents, channels), np.float32)
        draws["time"] = draw_times(stream("time"), flow.time, blocks)
        draws["at_zero"] = draw_clean_prefixes(stream("clean_prefix"), flow, blocks, block_size)
        draws["context_dropped"] = stream("context").random(blocks) < flow.context_dropout
    return draws
