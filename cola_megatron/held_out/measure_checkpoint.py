"""Held-out measurements of a checkpoint, outside training."""

from pathlib import Path

from cola_megatron.checkpoint.find import require_checkpoint
from cola_megatron.checkpoint.load import read_weights
from cola_megatron.config import ConfigError, resolve_config
from cola_megatron.data import PreparedFolder, ShardError
from cola_megatron.data.run_shards import open_shards
from cola_megatron.held_out.measure import evaluate
from cola_megatron.models.cola import Cola
from cola_megatron.parallel import initialize_parallel, load_full_state_dict


def measure_checkpoint(run_folder: Path, data: str | Path | None, samples: int) -> dict[str, float]:
    """`evaluate` with all it can measure on the newest checkpoint of a run; `data` replaces the run's own shards.

    Raises:
        ConfigError: no shards are known, or they do not fit the model.
        CheckpointError, ShardError: they cannot be read.
    """
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
    # Any length that the model can take will do for measuring.
    length = config.data.model_copy(update={"sequence_length": manifest.sequence_length})
    config = resolve_config(config.model_copy(update={"data": length}).model_dump())
    (held_out,) = open_shards(config, folder, ["held_out"], groups)
    evaluation = config.training.evaluation.model_copy(update={"samples": samples})
    # The reference encoder is no part of what is measured.
    objective = config.objective.model_copy(update={"reference_weight": 0.0})
    training = config.training.model_copy(update={"evaluation": evaluation})
    config = config.model_copy(update={"training": training, "objective": objective})
    model = Cola(config, groups)
    load_full_state_dict(model, weights, groups)
    return evaluate(model.to(groups.device), held_out, config, groups, shuffled_context=True, posterior_statistics=True)
