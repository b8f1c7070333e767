"""Held-out measurements of a checkpoint, outside training."""

from pathlib import Path
from typing import Any

from cola_megatron.checkpoint.find import require_checkpoint
from cola_megatron.checkpoint.load import read_weights
from cola_megatron.checkpoint.tokenizer import stored_tokenizer
from cola_megatron.config import ConfigError, resolve_config
from cola_megatron.data import PreparedFolder, ShardError, TokenShards, require_same_tokenizer
from cola_megatron.data.run_shards import open_shards
from cola_megatron.families import family_of
from cola_megatron.held_out.measure import evaluate
from cola_megatron.held_out.texts import decoder_for, held_out_texts
from cola_megatron.models.pipelined import PipelinedModel
from cola_megatron.parallel import initialize_parallel, load_full_state_dict


def measure_checkpoint(run_folder: Path, data: str | Path | None, samples: int) -> dict[str, float]:
    """`evaluate` with all it can measure on the newest checkpoint of a run; `data` replaces the run's own shards.

    Raises:
        ConfigError: no shards are known, or they do not fit the model.
        CheckpointError, ShardError: they cannot be read.
    """
    model, held_out = _model_and_texts(run_folder, data)
    evaluation = model.config.training.evaluation.model_copy(update={"samples": samples})
    training = model.config.training.model_copy(update={"evaluation": evaluation})
    config = model.config.model_copy(update={"training": training})
    return evaluate(model, held_out, config, model.groups, extras=family_of(config).extras)


def reconstruct_with_checkpoint(run_folder: Path, data: str | Path | None, texts: int) -> list[dict[str, Any]]:
    """Held-out texts beside what the newest checkpoint of a run of stage 1 makes of their latents, for a record.

    Raises:
        as `measure_checkpoint`.
    """
    model, held_out = _model_and_texts(run_folder, data)
    decode = decoder_for(stored_tokenizer(require_checkpoint(run_folder)))
    return [text.readable(decode) for text in held_out_texts(model, held_out, model.config, texts)]


def _model_and_texts(run_folder: Path, data: str | Path | None) -> tuple[PipelinedModel, TokenShards]:
    """The newest checkpoint, without what is no part of a measurement, and the held-out split."""
    config, weights = read_weights(require_checkpoint(run_folder))
    groups = initialize_parallel()
    folder = data or config.data.path
    if folder is None:
        raise ConfigError(f"{run_folder} names no shards: give --data FOLDER")
    try:
        manifest = PreparedFolder(folder, config.data.cache_folder).manifest
    except ShardError as error:
        if data is not None:
            raise
        raise ConfigError(f"the shards of {run_folder} are gone ({error}): give --data FOLDER") from error
    require_same_tokenizer(stored_tokenizer(require_checkpoint(run_folder)), folder, config.data.cache_folder)
    # Any length that the model can take will do for measuring.
    length = config.data.model_copy(update={"sequence_length": manifest.sequence_length})
    config = resolve_config(config.model_copy(update={"data": length}).model_dump())
    (held_out,) = open_shards(config, folder, ["held_out"], groups)
    family = family_of(config)
    model = family.build(family.measured_config(config), groups)
    load_full_state_dict(model, weights, groups)
    return model.to(groups.device), held_out
