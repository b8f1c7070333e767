"""What training knows of one sample: its tokens, which of them count, where documents end, and its random draws."""

import numpy as np

from cola_megatron.config import RunConfig
from cola_megatron.objectives.randomness import sample_draws


def training_sample(
    config: RunConfig, tokens_L: np.ndarray, padding_id: int, end_of_text_id: int, sample_index: int, step: int
) -> dict[str, np.ndarray]:
    """The fields of one sample in one step.

    Args:
        padding_id, end_of_text_id: -1 where no token is one.
        sample_index: global position of the sample in the run.

    Returns:
        those of `positions` and of `randomness.sample_draws`.
    """
    return {**positions(tokens_L, padding_id, end_of_text_id), **sample_draws(config, sample_index, step)}


def positions(tokens_L: np.ndarray, padding_id: int, end_of_text_id: int) -> dict[str, np.ndarray]:
    """`tokens`; `counted`: False for padding; `documents`: the number, from 0, of the document of each token.

    All are (L,). A document ends with its end-of-text token; padding belongs to none of them.
    """
    ends = tokens_L == end_of_text_id
    counted = tokens_L != padding_id
    documents = np.cumsum(ends) - ends
    return {"tokens": tokens_L, "counted": counted, "documents": np.where(counted, documents, -1)}
