"""How attention over `[clean copy | noisy copy]` is cut into products that leave out hidden pairs."""

import torch

from cola_megatron.config import TrainingConfig

# On a CPU chunks of 256 take 25% less time than one product at 512 positions of a copy, 45% less at 1,024; below there
# is little to win (tools/bench_attention.py).
LENGTH_WORTH_CHUNKS, CHUNK = 512, 256


def attention_chunk(training: TrainingConfig, length: int, device: torch.device) -> int:
    """Queries of one product over two copies of `length` positions, 0 for all of them; see `two_copies_in_chunks`."""
    if training.attention_chunk is not None:
        return training.attention_chunk
    return CHUNK if device.type == "cpu" and length >= LENGTH_WORTH_CHUNKS else 0
