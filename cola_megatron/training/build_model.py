"""From a config to this process's place in the job and its part of the model."""

from cola_megatron.config import RunConfig
from cola_megatron.families import family_of
from cola_megatron.models.pipelined import PipelinedModel
from cola_megatron.parallel import ProcessGroups, initialize_parallel
from cola_megatron.planning.split import pipeline_split


def initialize_run(config: RunConfig) -> ProcessGroups:
    """Joins the job with the layout of the config; raises ConfigError where the processes do not fit it."""
    parallel = config.parallel
    return initialize_parallel(
        parallel.tensor_parallel_size,
        parallel.sequence_parallel,
        parallel.timeout_minutes,
        parallel.pipeline_parallel_size,
        parallel.context_parallel_size,
    )


def build_model(config: RunConfig, groups: ProcessGroups) -> PipelinedModel:
    """This process's stage of the model, not yet filled; raises ConfigError for a split that does not fit it."""
    split = pipeline_split(config, groups.data_parallel_size) if groups.pipeline_parallel_size > 1 else None
    return family_of(config).build(config, groups, split)
