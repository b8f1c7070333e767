"""One sample as training reads it, of any family."""

from typing import Any

from numpy.typing import NDArray

from cola_megatron.config import RunConfig
from cola_megatron.families import family_of
from cola_megatron.objectives.samples import positions


def training_sample(
    config: RunConfig, tokens_L: NDArray[Any], padding_id: int, end_of_text_id: int, sample_index: int, step: int
) -> dict[str, NDArray[Any]]:
    """The fields of one sample in one step.

    Args:
        padding_id, end_of_text_id: -1 where no token is one.
        sample_index: global position of the sample in the run.

    Returns:
        those of `positions`, and the random draws of the family.
    """
    return {
        **positions(tokens_L, padding_id, end_of_text_id),
        **family_of(config).sample_draws(config, sample_index, step),
    }
