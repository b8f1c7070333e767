"""A new run that goes on from a checkpoint of another one, with its optimiser, under other settings."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cola_megatron.checkpoint.compatible import differing_keys, other_family
from cola_megatron.checkpoint.find import require_checkpoint
from cola_megatron.checkpoint.resume import verify_checkpoint
from cola_megatron.checkpoint.state_file import read_state
from cola_megatron.config import ConfigError, RunConfig, upgraded_tree
from cola_megatron.parallel import ProcessGroups
from cola_megatron.parallel.consensus import from_main, together
from cola_megatron.records.json_files import write_json

START = "start.json"
"""In the run folder: from which checkpoint it went on, and what differs."""


class Start(NamedTuple):
    """Where a new run goes on."""

    checkpoint: Path
    step: int
    has_optimizer: bool
    """False: the weights of an import, which are the start of a new run at step 0."""


def start_of_fork(config: RunConfig, groups: ProcessGroups) -> Start:
    """What `training.start_from` names; all ranks call it.

    Raises:
        ConfigError: another model, stage or optimiser, no step left, or an import where the family has another key for
            it. CheckpointError: there is none, or it is damaged.
    """
    assert config.training.start_from is not None, "asked for where it is given"
    source = from_main(groups, partial(require_checkpoint, config.training.start_from))
    state = read_state(source)
    given, step = f"training.start_from={config.training.start_from}", state["step"]
    stored = upgraded_tree(state["config"], source)
    if family := other_family(stored, config):
        raise ConfigError(f"{given} is of {family}: give a checkpoint of the same family")
    imported = "imported_from" in state
    if imported and "stage_one" in type(config.training).model_fields:
        raise ConfigError(f"{given} was imported and has no optimiser: give it as training.stage_one")
    here, there = config.training.optimizer.name, stored["training"]["optimizer"]["name"]
    if not imported and here != there:
        raise ConfigError(
            f"{given} has the state of {there}, and training.optimizer.name={here}: give {there} here too"
        )
    other = [
        f"{key} ({old!r} there, {new!r} here)"
        for key, old, new in _differences(source, config)
        if key == "stage" or (key.startswith("model.") and ".parametrization." not in key)
    ]
    if other:
        raise ConfigError(f"{given} is of another model: {', '.join(other)}")
    if step >= config.training.steps:
        raise ConfigError(f"{given} is at step {step}, and training.steps={config.training.steps}: give more steps")
    together(groups, partial(verify_checkpoint, source, groups.rank, groups.world_size))
    return Start(source, step, has_optimizer=not imported)


def record_fork(config: RunConfig, source: Path) -> None:
    """Writes start.json; the main process calls it."""
    differences = {key: {"there": old, "here": new} for key, old, new in _differences(source, config)}
    config.run_folder.mkdir(parents=True, exist_ok=True)
    content = {"start_from": str(source.absolute()), "step": read_state(source)["step"], "differences": differences}
    write_json(config.run_folder / START, content)


def _differences(source: Path, config: RunConfig) -> list[tuple[str, Any, Any]]:
    """All but those of how a run is run."""
    found = differing_keys(upgraded_tree(read_state(source)["config"], source), config.model_dump(mode="json"))
    return [each for each in found if each[0] != "training.start_from"]
