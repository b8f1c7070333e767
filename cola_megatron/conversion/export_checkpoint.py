"""A checkpoint of ours in the layout that other programs of its family read."""

from pathlib import Path

import torch

from cola_megatron.data.manifest import TOKENIZER_NAME
from cola_megatron.errors import UserError
from cola_megatron.families import FAMILIES
from cola_megatron.interop.errors import PublishedError
from cola_megatron.interop.stored_model import CheckpointModel
from cola_megatron.interop.weight_files import MAX_SHARD_BYTES


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = True,
    ema: bool = False,
) -> CheckpointModel:
    """Writes a checkpoint, or a run's newest one, tensor by tensor; no model is built.

    Args:
        dtype: of the written weights. By default an imported checkpoint is written as it was read, type by type and
            key by key of config.json, and a trained one in float32.
        ema: the averages of the weights in their place.

    Returns:
        what was written.

    Raises:
        CheckpointError: there is none, or it is damaged. PublishedError: the layout cannot hold this model; or it was
            trained, and no tokenizer is known (an import without one is exported as it was). UserError: its family has
            no such layout.
    """
    model = CheckpointModel(checkpoint, ema)
    family = FAMILIES[model.config.family]
    if not family.formats:
        raise UserError(
            f"{family.title} has no layout of another program to be written in; every command and `load_model` read "
            f"{model.folder} itself"
        )
    if model.tokenizer is None and model.imported is None:
        raise PublishedError(
            f"no tokenizer.json is known for {model.folder}, and an export without one can read no text: copy the one "
            f"of its data to {model.folder / TOKENIZER_NAME}"
        )
    family.formats[0].write(output, model, dtype, max_shard_bytes, progress)
    return model
