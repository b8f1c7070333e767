"""How large `[clean copy | noisy copy]` is, counted from the config."""

from cola_megatron.config import ColaConfig


def two_copy_positions(config: ColaConfig) -> int:
    """Positions of `[clean copy | noisy copy]`: the last clean block is seen by nobody and is left out."""
    return 2 * config.latent_length - config.model.dit.block_size


def distinct_times(config: ColaConfig) -> int:
    """Times of one sample at which the modulations are evaluated (t = 0, shared by a whole batch, is not counted)."""
    return config.latent_length // config.model.dit.block_size if config.objective.flow.time.per == "block" else 1


def pairs_in_products(config: ColaConfig) -> int:
    """Pairs in the products of one sample: of all positions, or of the chunks of `two_copies_in_chunks`."""
    positions, length, block = two_copy_positions(config), config.latent_length, config.model.dit.block_size
    chosen = config.training.attention_chunk
    if not chosen:
        return positions**2
    size, clean_length = -(-chosen // block) * block, positions - length
    of_clean = [(min(start + size, clean_length), start) for start in range(0, clean_length, size)]
    of_noisy = [(min(start + size, length), start) for start in range(0, length, size)]
    return sum((end - start) * end for end, start in of_clean) + sum(
        (end - start) * (min(end, clean_length) + end - start) for end, start in of_noisy
    )
