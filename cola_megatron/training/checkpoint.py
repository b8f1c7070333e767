"""Checkpoints: written beside, moved into place when complete, found again, refused when they do not fit.

    checkpoints/step_00000200/
        state.json    step, samples seen, config, layout, data fingerprint, versions, files with their sizes
        tensors/      weights and moments of AdamW in float32, by name: see `sharded_tensors`

A checkpoint belongs to no layout: tensors are whole whoever wrote them, and every process reads its own part. Resuming
reads all of them; export, evaluation, stage 2 and notebooks read the weights. Randomness and data order are pure
functions of (seed, step), so `step` is their state and the counter of AdamW.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn

from cola_megatron.config import RunConfig, resolve_config
from cola_megatron.parallel import ProcessGroups
from cola_megatron.training.engine import Engine
from cola_megatron.training.engine_state import WEIGHTS, pieces_to_load, pieces_to_save, weight_pieces
from cola_megatron.training.sharded_tensors import (
    CheckpointError,
    StoredTensors,
    Written,
    flush,
    write_index,
    write_pieces,
)
from cola_megatron.training.versions import versions

STATE, TENSORS = "state.json", "tensors"
T = TypeVar("T")

# May differ between a checkpoint and the run that resumes it: they change how a run is run, not what it computes.
FREE_KEYS = (
    "name",
    "runs_folder",
    "data.path",
    "data.verify",
    "data.bad_shards",
    "data.cache_folder",
    "data.cache_bytes",
    "parallel",
    "training.steps",
    "training.stop_after",
    "training.micro_batch_size",
    "training.activation_checkpointing",
    "training.stage_one",
    "training.resume",
    "training.loader_workers",
    "training.prefetch_steps",
    "training.evaluation",
    "training.checkpoint",
    "training.log",
)


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

    def begin() -> None:
        for leftover in folder.glob(".saving_*"):
            shutil.rmtree(leftover)
        (unfinished / TENSORS).mkdir(parents=True)

    def write() -> list[Written]:
        return write_pieces(unfinished / TENSORS, f"rank_{groups.rank:05d}", pieces_to_save(engine, step))

    def finish() -> None:
        write_index(unfinished / TENSORS, [piece for pieces in parts for piece in pieces])
        write_state(unfinished, _state(config, step, data_fingerprint, groups))
        if final.exists():
            shutil.rmtree(final)
        unfinished.rename(final)
        flush(folder)
        _prune(folder, config.training.checkpoint.keep_last)

    try:
        _together(groups, begin if groups.is_main else None)
        parts = _together(groups, write)
        _together(groups, finish if groups.is_main else None)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{final}: the checkpoint could not be written ({reason}); the one before stays good: "
            "see that the disk has space, and run again"
        ) from error
    return final


def check_checkpoint(checkpoint: Path, config: RunConfig, data_fingerprint: str) -> int:
    """Whether a run of this config can go on from a checkpoint; returns the number of steps done.

    Raises:
        CheckpointError: another config (the message names the keys), other data, or missing files.
    """
    state = read_state(checkpoint)
    differing = differing_keys(state["config"], config.model_dump(mode="json"))
    if differing:
        raise CheckpointError(
            f"{checkpoint} is of another config: "
            + "; ".join(f"{key} was {old!r}, now {new!r}" for key, old, new in differing)
            + "; give the old values, or another name= for a new run"
        )
    if state["data_fingerprint"] != data_fingerprint:
        raise CheckpointError(f"{checkpoint} was trained on other shards than those in data.path={config.data.path}")
    for name, size in state["files"].items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            raise CheckpointError(f"{path} is missing or cut short; delete {checkpoint} to resume from the one before")
    return state["step"]


def load_weights(module: nn.Module, checkpoint: Path, groups: ProcessGroups, prefix: str = "") -> None:
    """Fills a module, or this rank's part of one, that no engine has taken over yet; all ranks call it.

    Args:
        prefix: what the names in the checkpoint have before those in the module: "vae." for a VAE alone.

    Raises:
        CheckpointError: missing or damaged files, or another model; on every rank.
    """
    _together(groups, lambda: StoredTensors(checkpoint / TENSORS).fill(weight_pieces(module, groups, prefix)))


def load_optimizer(engine: Engine, checkpoint: Path) -> None:
    """Gives an engine over a model from `load_weights` the exact float32 masters and the optimiser's state.

    Raises:
        CheckpointError: missing or damaged files; on every rank.
    """

    def load() -> None:
        steps = read_state(checkpoint)["step"]
        StoredTensors(checkpoint / TENSORS).fill(pieces_to_load(engine, steps))

    _together(engine.groups, load)


def read_weights(checkpoint: Path) -> tuple[RunConfig, dict[str, torch.Tensor]]:
    """The config and the whole float32 weights of a checkpoint but the reference encoder's, without an engine.

    Raises:
        CheckpointError: missing or damaged files.
    """
    config, stored = resolve_config(read_state(checkpoint)["config"]), StoredTensors(checkpoint / TENSORS)
    names = [name for name in stored.shapes if name.startswith(WEIGHTS)]
    return config, {
        name.removeprefix(WEIGHTS): stored.read(name) for name in names if not name.startswith(f"{WEIGHTS}reference.")
    }


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


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Completes a checkpoint whose other files are there with state.json, which also gets their sizes."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    (folder / STATE).write_text(json.dumps({**state, "files": sizes}, indent=1) + "\n")
    flush(folder / STATE)
    flush(folder)


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


def _state(config: RunConfig, step: int, data_fingerprint: str, groups: ProcessGroups) -> dict[str, Any]:
    return {
        "step": step,
        "samples_seen": step * config.training.global_batch_size,
        "layout": {
            "tensor_parallel": groups.tensor_parallel_size,
            "pipeline_parallel": groups.pipeline_parallel_size,
            "data_parallel": groups.data_parallel_size,
            "zero_stage": config.parallel.zero_stage,
        },
        "data_fingerprint": data_fingerprint,
        "versions": versions(),
        "config": config.model_dump(mode="json"),
    }


def _prune(folder: Path, keep_last: int) -> None:
    for old in _checkpoints(folder)[:-keep_last]:
        shutil.rmtree(old)


def _checkpoints(folder: Path) -> list[Path]:
    """In order of steps; other names (`step_00000200.bak`, ...) are the user's own and are left alone."""
    found = [path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def _together(groups: ProcessGroups, work: Callable[[], T] | None) -> list[T]:
    """Runs `work` on every rank (None: nothing to do on this one).

    Returns:
        the results of all ranks, on the main process; elsewhere nothing.

    Raises:
        Exception: what `work` raised; on the other ranks a CheckpointError with the same message.
    """
    result = failure = None
    try:
        result = work() if work is not None else None
    except Exception as error:  # raised again below, when all ranks know of it
        failure = error
    answers = [None] * groups.world_size if groups.is_main else None
    message = None if failure is None else (str(failure) or type(failure).__name__).splitlines()[0]
    dist.gather_object((result, message), answers)
    first = [next((message for _, message in answers if message is not None), None)] if groups.is_main else [None]
    dist.broadcast_object_list(first)
    if failure is not None:
        raise failure
    if first[0] is not None:
        raise CheckpointError(first[0])
    return [result for result, _ in answers] if groups.is_main else []
