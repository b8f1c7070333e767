"""The held-out texts that a model in training writes, in any layout, and how they become readable."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from cola_megatron.config import RunConfig
from cola_megatron.data import TokenShards, held_out_samples, read_tokenizer
from cola_megatron.errors import UserError
from cola_megatron.families import family_of
from cola_megatron.families.texts import HeldOutText
from cola_megatron.inference.text_stream import Decode
from cola_megatron.models.pipelined import PipelinedModel

logger = logging.getLogger(__name__)


@torch.no_grad()
def held_out_texts(
    model: PipelinedModel,
    shards: TokenShards,
    config: RunConfig,
    count: int,
    on_pass: Callable[[], None] = lambda: None,
) -> Sequence[HeldOutText]:
    """The first texts of the measured sequences, as the model writes them; every rank calls it, and gets the same.

    Args:
        on_pass: called after every pass of a network.
    """
    held_out = held_out_samples(shards, skip_bad=config.data.bad_shards == "skip")
    texts = [next(held_out.read(place, 1)).tokens for place in range(min(count, len(shards)))]
    if not texts:
        return []
    model.eval()
    found = family_of(config).write_texts(model, config, np.stack(texts), held_out, on_pass)
    model.train()
    return found


def decoder_for(file: Path | None) -> Decode:
    """Token ids to text, by the tokenizer of a run; without one the ids themselves, and a line in the log."""
    try:
        if file is not None and file.is_file():
            tokenizer = read_tokenizer(file)
            return lambda tokens: tokenizer.decode(tokens, skip_special_tokens=False)
        reason = "the run has no tokenizer"
    except UserError as error:
        reason = str(error)
    logger.warning("%s: texts are written as token ids", reason)
    return lambda tokens: "".join(f"{token} " for token in tokens)
