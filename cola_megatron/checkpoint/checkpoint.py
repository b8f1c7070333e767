"""Checkpoints: what they consist of, found, read, refused when they do not fit.

    checkpoints/step_00000200/
        state.json    format, step, samples seen, config, layout, data fingerprint, versions, files, sizes, checksums
        tensors/      weights and moments of AdamW in float32, by name: see `sharded_tensors`

A checkpoint belongs to no layout: tensors are whole whoever wrote them, and every process reads its own part. Resuming
reads all of them; export, evaluation, stage 2 and notebooks read the weights. Randomness and data order are pure
functions of (seed, step), so `step` is their state and the counter of AdamW.

state.json holds the checksum of the index of the tensors and its own, and the index those of all pieces. Written they
are by `checkpoint_writer`; what a run resumes from is chosen by `resume`.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cola_megatron.checkpoint.folder import step_folders
from cola_megatron.checkpoint.pieces import WEIGHTS, TrainingState, pieces_to_load, weight_pieces
from cola_megatron.checkpoint.sharded_tensors import INDEX, CheckpointError, DamagedCheckpoint, StoredTensors, flush
from cola_megatron.config import RunConfig, stored_config, upgraded_tree
from cola_megatron.config.changes import what_became_of
from cola_megatron.config.walk import free_keys
from cola_megatron.parallel import ProcessGroups
from cola_megatron.parallel.consensus import together

STATE, TENSORS = "state.json", "tensors"
_FORMAT, _INDEX_CRC32, _STATE_CRC32 = "format", "index_crc32", "state_crc32"

FORMAT = 1
"""Of state.json and of the tensors beside it: one more with each change that a version before it cannot read. The
schema of the config is a number of its own, in the config."""

FREE_KEYS = free_keys(RunConfig)
"""May differ between a checkpoint and the run that resumes it; fields of the config are marked so."""


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The complete checkpoint with the highest step, or None. A folder a kill left half-written is not one."""
    complete = [path for path in step_folders(run_folder) if (path / STATE).is_file()]
    return complete[-1] if complete else None


def check_checkpoint(checkpoint: Path, config: RunConfig, data_fingerprint: str) -> int:
    """Whether a checkpoint is one of a run of this config; returns the number of steps done. Reads state.json only.

    Raises:
        CheckpointError: another config (the message names the keys) or other data. DamagedCheckpoint: no good state.
        ConfigError: a newer version wrote the config.
    """
    state = read_state(checkpoint)
    differing = differing_keys(upgraded_tree(state["config"], checkpoint), config.model_dump(mode="json"))
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


def load_weights(module: nn.Module, checkpoint: Path, groups: ProcessGroups, prefix: str = "") -> None:
    """Fills a module, or this rank's part of one, that no engine has taken over yet; all ranks call it.

    Args:
        prefix: what the names in the checkpoint have before those in the module: "vae." for a VAE alone.

    Raises:
        CheckpointError: missing or damaged files, or another model; on every rank.
    """
    together(groups, lambda: open_tensors(checkpoint).fill(weight_pieces(module, groups, prefix)))


def load_optimizer(engine: TrainingState, checkpoint: Path) -> None:
    """Gives an engine over a model from `load_weights` the exact float32 masters and the optimiser's state.

    Raises:
        CheckpointError: missing or damaged files; on every rank.
    """

    def load() -> None:
        engine.skipped_updates = divergence_of(checkpoint).get("skipped_updates", 0)
        steps = read_state(checkpoint)["step"] - engine.skipped_updates
        open_tensors(checkpoint).fill(pieces_to_load(engine, steps))

    together(engine.groups, load)


def divergence_of(checkpoint: Path) -> dict[str, Any]:
    """What `training.divergence.Divergence` gave to a checkpoint; raises CheckpointError."""
    return read_state(checkpoint).get("divergence", {})


def read_weights(checkpoint: Path) -> tuple[RunConfig, dict[str, torch.Tensor]]:
    """The config and the whole float32 weights of a checkpoint but the reference encoder's, without an engine.

    Raises:
        CheckpointError: missing or damaged files. ConfigError: as `read_config`.
    """
    config, stored = read_config(checkpoint), open_tensors(checkpoint)
    names = [name for name in stored.shapes if name.startswith(WEIGHTS)]
    return config, {
        name.removeprefix(WEIGHTS): stored.read(name) for name in names if not name.startswith(f"{WEIGHTS}reference.")
    }


def read_config(checkpoint: Path) -> RunConfig:
    """The config of a checkpoint that any version wrote.

    Raises:
        DamagedCheckpoint: no good state. ConfigError: a newer version wrote it, or there is no such model any more.
    """
    return stored_config(read_state(checkpoint)["config"], checkpoint)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What state.json of a checkpoint says of it, the config as it was stored.

    Raises:
        DamagedCheckpoint: it is not what was written. CheckpointError: a newer version wrote it.
    """
    path = checkpoint / STATE
    try:
        state = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({error})") from None
    found = state.get(_FORMAT) if isinstance(state, dict) else None
    # Before the checksum, which a newer format may count otherwise: its checkpoints are not damaged.
    if isinstance(found, int) and found > FORMAT:
        raise CheckpointError(
            f"{checkpoint} is of format {found}, and this version of cola_megatron reads formats up to {FORMAT}: use "
            "the version that wrote it, or a newer one"
        )
    written = state.pop(_STATE_CRC32, None) if isinstance(state, dict) else 0
    if written is not None and written != _checksum(state):
        raise DamagedCheckpoint(f"{path} is not what was written")
    return state


def open_tensors(checkpoint: Path) -> StoredTensors:
    """The tensors of a checkpoint, for reading; raises DamagedCheckpoint."""
    return StoredTensors(checkpoint / TENSORS, read_state(checkpoint).get(_INDEX_CRC32))


def require_checkpoint(run_folder: Path) -> Path:
    """The newest checkpoint of a run folder, or the folder itself where it is one; raises CheckpointError."""
    if (run_folder / STATE).is_file():
        return run_folder
    checkpoint = newest_checkpoint(run_folder)
    if checkpoint is None:
        raise CheckpointError(f"{run_folder} holds no complete checkpoint; train it first, or check the path")
    return checkpoint


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Completes a checkpoint whose other files are there with state.json, which also gets sizes and checksums."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    state = {**state, _FORMAT: FORMAT, "files": sizes}
    state[_INDEX_CRC32] = zlib.crc32((folder / TENSORS / INDEX).read_bytes())
    (folder / STATE).write_text(json.dumps({**state, _STATE_CRC32: _checksum(state)}, indent=1) + "\n")
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


def _checksum(state: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())
