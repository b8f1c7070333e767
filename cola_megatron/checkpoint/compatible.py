"""Whether a run of some config may go on from a checkpoint."""

from pathlib import Path
from typing import Any

from cola_megatron.checkpoint.errors import CheckpointError
from cola_megatron.checkpoint.state_file import read_state
from cola_megatron.config import RunConfig, upgraded_tree
from cola_megatron.config.changes import what_became_of
from cola_megatron.config.families import DEFAULT
from cola_megatron.config.walk import free_keys

FREE_KEYS = free_keys(RunConfig)
"""May differ between a checkpoint and the run that resumes it; fields of the config are marked so."""


def check_checkpoint(checkpoint: Path, config: RunConfig, data_fingerprint: str) -> int:
    """Whether a checkpoint is one of a run of this config; returns the number of steps done. Reads state.json only.

    Raises:
        CheckpointError: another config (the message names the keys) or other data. DamagedCheckpoint: no good state.
        ConfigError: a newer version wrote the config.
    """
    state = read_state(checkpoint)
    stored = upgraded_tree(state["config"], checkpoint)
    if other := other_family(stored, config):
        raise CheckpointError(f"{checkpoint} is of {other}; give another name= for a new run")
    differing = differing_keys(stored, config.model_dump(mode="json"))
    if differing:
        raise CheckpointError(
            f"{checkpoint} is of another config: "
            + "; ".join(
                f"{key} was {old!r}, {what_became_of(key, RunConfig.history) or f'now {new!r}'}"
                for key, old, new in differing
            )
            + "; give the old values, or another name= for a new run"
        )
    if state["data_fingerprint"] != data_fingerprint:
        raise CheckpointError(f"{checkpoint} was trained on other shards than those in data.path={config.data.path}")
    return state["step"]


def other_family(stored: dict[str, Any], config: RunConfig) -> str | None:
    """In words, that a stored config is of another family than this one; None: it is of the same."""
    there, here = stored["model"].get("family", DEFAULT), config.model.family
    return None if there == here else f"model.family={there}, and this config has model.family={here}"


def differing_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(key, old, new) where two plain config trees differ outside `FREE_KEYS`."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        key = f"{prefix}{name}"
        if key in FREE_KEYS or old.get(name) == new.get(name):
            continue
        if isinstance(old.get(name), dict) and isinstance(new.get(name), dict):
            found += differing_keys(old[name], new[name], f"{key}.")
        else:
            found.append((key, old.get(name), new.get(name)))
    return found
