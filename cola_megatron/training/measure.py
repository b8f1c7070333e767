"""Held-out measurements of a checkpoint, outside training."""

from pathlib import Path

from cola_megatron.config import ConfigError, resolve_config
from cola_megatron.data import read_manifest
from cola_megatron.data.manifest import MANIFEST_NAME
from cola_megatron.models.cola import Cola
from cola_megatron.parallel import initialize_parallel, load_full_state_dict
from cola_megatron.training.checkpoint import read_weights, require_checkpoint
from cola_megatron.training.evaluation import evaluate
from cola_megatron.training.open_shards import open_shards


def measure_checkpoint(run_folder: Path, data: Path | None, samples: int) -> dict[str, float]:
    """`evaluate` on the newest checkpoint of a run; `data` replaces the run's own shards.

    Raises:
        ConfigError: no shards are known, or they do not fit the model.
        CheckpointError, ShardError: they cannot be read.
    """
    config, weights = read_weights(require_checkpoint(run_folder))
    groups = initialize_parallel()
    folder = data or config.data.path
    if folder is None or (data is None and not (folder / MANIFEST_NAME).is_file()):
        raise ConfigError(f"{run_folder} names no shards: give --data FOLDER")
    # Any length that the model can take will do for measuring.
    length = config.data.model_copy(update={"sequence_length": read_manifest(folder).sequence_length})
    config = resolve_config(config.model_copy(update={"data": length}).model_dump())
    (held_out,) = open_shards(config, folder, ["held_out"], groups)
    evaluation = config.training.evaluation.model_copy(update={"samples": samples})
    # The reference encoder is no part of what is measured.
    objective = config.objective.model_copy(update={"reference_weight": 0.0})
    training = config.training.model_copy(update={"evaluation": evaluation})
    config = config.model_copy(update={"training": training, "objective": objective})
    model = Cola(config, groups)
    load_full_state_dict(model, weights, groups)
    return evaluate(model.to(groups.device), held_out, config, groups)
