"""How large `[clean copy | noisy copy]` is, counted from the config."""

from cola_megatron.config import ColaConfig


def two_copy_positions(config: ColaConfig) -> int:
    """Positions of `[clean copy | noisy copy]`: the last clean block is seen by nobody and is left out."""
    return 2 * config.latent_length - config.model.dit.block_size


def distinct_times(config: ColaConfig) -> int:
    """Times of one sample at which the modulations are evaluated (t = 0, shared by a whole batch, is not counted)."""
    return config.latent_length // config.model.dit.block_size if config.objective.flow.time.per == "block" else 1
