"""Checkpoints: written beside, moved into place when complete, found again, refused when they do not fit.

    checkpoints/step_00000200/
        state.json            step, samples seen, config, layout, data fingerprint, versions, files with their sizes
        weights.safetensors   whole float32 tensors by name: what export, evaluation, stage 2 and notebooks read
        engine/               DeepSpeed's state, one set of files per rank: what resuming reads

Randomness and data order are pure functions of (seed, step), so `step` is their state.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cola_megatron.config import RunConfig, resolve_config
from cola_megatron.errors import UserError
from cola_megatron.interop.tensor_files import write_tensors
from cola_megatron.parallel import ProcessGroups
from cola_megatron.training.engine import Engine
from cola_megatron.training.versions import versions

ENGINE, WEIGHTS, STATE = "engine", "weights.safetensors", "state.json"

# May differ between a checkpoint and the run that resumes it: they change how a run is run, not what it computes.
FREE_KEYS = (
    "name",
    "runs_folder",
    "data.path",
    "data.verify",
    "parallel.timeout_minutes",
    "parallel.reduce_bucket_size",
    "parallel.overlap_communication",
    "training.steps",
    "training.stop_after",
    "training.micro_batch_size",
    "training.activation_checkpointing",
    "training.stage_one",
    "training.resume",
    "training.loader_workers",
    "training.evaluation",
    "training.checkpoint",
    "training.log",
)


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is missing, damaged, or of another config; one line with the cure."""


def checkpoints_folder(run_folder: Path) -> Path:
    """Where the checkpoints of a run lie."""
    return run_folder / "checkpoints"


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The complete checkpoint with the highest step, or None. A folder a kill left half-written is not one."""
    complete = [path for path in _checkpoints(checkpoints_folder(run_folder)) if (path / STATE).is_file()]
    return complete[-1] if complete else None


def save_checkpoint(engine: Engine, step: int, data_fingerprint: str, groups: ProcessGroups) -> Path:
    """Writes the state after `step` optimiser steps; all ranks call it.

    Everything is written into a folder of another name and renamed when it is complete and on the disk: a kill at any
    moment leaves the previous checkpoint as the newest.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; the previous checkpoint stays good.
    """
    config = engine.config
    folder = checkpoints_folder(config.run_folder)
    final, unfinished = folder / f"step_{step:08d}", folder / f".saving_step_{step:08d}"
    weights = engine.whole_weights()
    try:
        if groups.is_main:
            for leftover in folder.glob(".saving_*"):
                shutil.rmtree(leftover)
            unfinished.mkdir(parents=True)
            write_tensors(unfinished / WEIGHTS, weights)
        groups.barrier()
        engine.save(unfinished, ENGINE)
        groups.barrier()
        if groups.is_main:
            for script in unfinished.glob("zero_to_*.py"):
                script.unlink()  # DeepSpeed's recovery scripts; weights.safetensors is what they would recover
            state = _state(config, step, data_fingerprint, groups, unfinished)
            (unfinished / STATE).write_text(json.dumps(state, indent=1) + "\n")
            _flush_to_disk(unfinished)
            if final.exists():
                shutil.rmtree(final)
            unfinished.rename(final)
            _flush_entry(folder)
            _prune(folder, config.training.checkpoint.keep_last)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as a RuntimeError
        raise CheckpointError(
            f"{final}: the checkpoint could not be written ({error}); the one before stays good: "
            "see that the disk has space, and run again"
        ) from error
    groups.barrier()
    return final


def check_checkpoint(checkpoint: Path, config: RunConfig, data_fingerprint: str, groups: ProcessGroups) -> int:
    """Whether a run of this config can go on from a checkpoint; returns the number of steps done.

    Raises:
        CheckpointError: another config (the message names the keys), another layout, other data, or missing files.
    """
    state = read_state(checkpoint)
    differing = differing_keys(state["config"], config.model_dump(mode="json"))
    if differing:
        raise CheckpointError(
            f"{checkpoint} is of another config: "
            + "; ".join(f"{key} was {old!r}, now {new!r}" for key, old, new in differing)
            + "; give the old values, or another name= for a new run"
        )
    layout = _layout(groups)
    if state["layout"] != layout:
        raise CheckpointError(f"{checkpoint} was written by {state['layout']}, this job has {layout}; start it alike")
    if state["data_fingerprint"] != data_fingerprint:
        raise CheckpointError(f"{checkpoint} was trained on other shards than those in data.path={config.data.path}")
    for name, size in state["files"].items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            raise CheckpointError(f"{path} is missing or cut short; delete {checkpoint} to resume from the one before")
    return state["step"]


def load_checkpoint(engine: Engine, checkpoint: Path) -> None:
    """Restores an engine from a checkpoint that `check_checkpoint` let pass."""
    engine.load(checkpoint, ENGINE)


def read_weights(checkpoint: Path) -> tuple[RunConfig, dict[str, torch.Tensor]]:
    """The config and the whole float32 tensors of a checkpoint, without an engine.

    Raises:
        CheckpointError: missing or damaged files.
    """
    state = read_state(checkpoint)
    path = checkpoint / WEIGHTS
    if not path.is_file() or path.stat().st_size != state["files"][WEIGHTS]:
        raise CheckpointError(f"{path} is missing or cut short")
    return resolve_config(state["config"]), load_file(path)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint; raises CheckpointError."""
    try:
        return json.loads((checkpoint / STATE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{checkpoint / STATE} cannot be read ({error}); delete {checkpoint}") from None


def require_checkpoint(run_folder: Path) -> Path:
    """The newest checkpoint of a run folder, or the folder itself where it is one; raises CheckpointError."""
    if (run_folder / STATE).is_file():
        return run_folder
    checkpoint = newest_checkpoint(run_folder)
    if checkpoint is None:
        raise CheckpointError(f"{run_folder} holds no complete checkpoint; train it first, or check the path")
    return checkpoint


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


def _state(config: RunConfig, step: int, data_fingerprint: str, groups: ProcessGroups, folder: Path) -> dict[str, Any]:
    files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        "step": step,
        "samples_seen": step * config.training.global_batch_size,
        "layout": _layout(groups),
        "data_fingerprint": data_fingerprint,
        "versions": versions(),
        "files": files,
        "config": config.model_dump(mode="json"),
    }


def _layout(groups: ProcessGroups) -> dict[str, int]:
    return {"tensor_parallel": groups.tensor_parallel_size, "data_parallel": groups.data_parallel_size}


def _flush_to_disk(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _flush_entry(path)


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(folder: Path, keep_last: int) -> None:
    for old in _checkpoints(folder)[:-keep_last]:
        shutil.rmtree(old)


def _checkpoints(folder: Path) -> list[Path]:
    """In order of steps; other names (`step_00000200.bak`, ...) are the user's own and are left alone."""
    found = [path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))
