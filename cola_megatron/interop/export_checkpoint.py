"""A checkpoint of ours in the published layout."""

from pathlib import Path

import torch

from cola_megatron.interop.errors import PublishedError
from cola_megatron.interop.published import TOKENIZER, write_published
from cola_megatron.interop.stored_model import CheckpointModel
from cola_megatron.interop.weight_files import MAX_SHARD_BYTES


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = True,
) -> CheckpointModel:
    """Writes a checkpoint, or a run's newest one, tensor by tensor; no model is built.

    Args:
        dtype: of the written weights. By default an imported checkpoint is written as it was read, type by type and
            key by key of config.json, and a trained one in float32.

    Returns:
        what was written.

    Raises:
        CheckpointError: there is none, or it is damaged. PublishedError: the layout cannot hold this model; or it was
            trained, and no tokenizer is known (an import without one is exported as it was).
    """
    model = CheckpointModel(checkpoint)
    if model.tokenizer is None and model.forms is None:
        raise PublishedError(
            f"no tokenizer.json is known for {model.folder}, and an export without one can read no text: copy the one "
            f"of its data to {model.folder / TOKENIZER}"
        )
    write_published(output, model.config, model, model.tokenizer, dtype, model.forms, max_shard_bytes, progress)
    return model
