"""Which steps of the chain each pipeline stage computes."""

from cola_megatron.config import ConfigError, RunConfig
from cola_megatron.families import family_of
from cola_megatron.planning.balance import balance
from cola_megatron.planning.flops import stage_costs


def pipeline_split(config: RunConfig, data_parallel_size: int = 1) -> tuple[int, ...]:
    """For each stage the number of its steps with parameters: as set by hand, or balanced by `stage_costs`.

    Raises:
        ConfigError: more stages than steps that train something, a split that does not add up, or a stage of it
            that trains nothing.
    """
    stages, split = config.parallel.pipeline_parallel_size, config.parallel.pipeline_split
    parts = family_of(config).parts(config)
    trained = [part.backward for part in parts]
    if sum(trained) < stages:
        raise ConfigError(
            f"parallel.pipeline_parallel_size={stages}, but the chain has {sum(trained)} steps that train something; "
            "use fewer stages"
        )
    if split is None:
        return balance(stage_costs(config, data_parallel_size), stages, trained)
    if sum(split) != len(parts):
        raise ConfigError(
            f"parallel.pipeline_split={split} adds up to {sum(split)}; the chain has {len(parts)} steps with parameters"
        )
    for stage, count in enumerate(split):
        first = sum(split[:stage])
        if not any(trained[first : first + count]):
            raise ConfigError(
                f"parallel.pipeline_split={split}: stage {stage} holds {parts[first].label} and nothing that is "
                "trained; give it more steps"
            )
    return tuple(split)
