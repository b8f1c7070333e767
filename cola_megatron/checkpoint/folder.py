"""The folder of a run's checkpoints: what is found there, begun, completed and removed, so that a kill harms nothing.

checkpoints/
    step_00000200              complete, and kept
    .saving_step_00000300      not yet complete
    .deleting_step_00000100    no longer
    damaged_step_00000250      moved aside by `resume`, for somebody to look at; never removed

What cannot be removed (open on another node, a busy mount) stays under its `.deleting_` name, with a warning: cleaning
never fails a save, and every save tries again.
"""

import logging
import shutil
from pathlib import Path

from cola_megatron.checkpoint.errors import CheckpointError
from cola_megatron.config import CheckpointConfig
from cola_megatron.records.on_disk import flush

logger = logging.getLogger(__name__)

UNFINISHED, UNWANTED, DAMAGED = ".saving_", ".deleting_", "damaged_"


def checkpoints_folder(run_folder: Path) -> Path:
    """Where the checkpoints of a run lie."""
    return run_folder / "checkpoints"


def folder_of(run_folder: Path, step: int) -> Path:
    """The checkpoint after `step` optimiser steps."""
    return checkpoints_folder(run_folder) / f"step_{step:08d}"


def step_folders(run_folder: Path) -> list[Path]:
    """All that is named as a checkpoint, complete or not, in order of steps.

    Other names (`step_00000200.bak`, ...) are the user's own and are left alone.
    """
    found = [path for path in checkpoints_folder(run_folder).glob("step_*") if _number(path).isdecimal()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step that a folder of `step_folders` is named after."""
    return int(_number(folder))


def unfinished_folder(final: Path) -> Path:
    """Where a checkpoint is written before it is complete."""
    return final.with_name(f"{UNFINISHED}{final.name}")


def begin_folder(final: Path, size: int) -> None:
    """Makes the folder in which a checkpoint of `size` bytes is written, and removes what kills left of others.

    Raises:
        CheckpointError: the file system has not that much space.
    """
    folder = final.parent
    folder.mkdir(parents=True, exist_ok=True)
    for unwanted in folder.glob(f"{UNWANTED}*"):
        _delete(unwanted)
    for unfinished in folder.glob(f"{UNFINISHED}*"):
        _remove(unfinished)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise CheckpointError(f"it takes {size / 1e9:.4g} GB and {free / 1e9:.4g} GB are free")
    unfinished_folder(final).mkdir()


def complete_folder(final: Path) -> None:
    """Gives a checkpoint whose files are on the disk its final name."""
    _remove(final)
    unfinished_folder(final).rename(final)
    flush(final.parent)


def move_aside(checkpoint: Path) -> Path:
    """Takes a damaged checkpoint out of those that runs resume from; returns its new place."""
    aside = _free_name(checkpoint.with_name(f"{DAMAGED}{checkpoint.name}"))
    checkpoint.rename(aside)
    return aside


def set_aside(run_folder: Path) -> list[Path]:
    """What `move_aside` left."""
    return sorted(checkpoints_folder(run_folder).glob(f"{DAMAGED}*"))


def prune(run_folder: Path, kept: CheckpointConfig) -> None:
    """Removes the checkpoints that are not to be kept."""
    for old in step_folders(run_folder)[: -kept.keep_last]:
        if not kept.is_kept(step_of(old)):
            _remove(old)


def _remove(checkpoint: Path) -> None:
    """Under another name first: a kill must not leave half of a checkpoint under its own."""
    unwanted = _free_name(checkpoint.with_name(f"{UNWANTED}{checkpoint.name.removeprefix(UNFINISHED)}"))
    try:
        checkpoint.rename(unwanted)
    except FileNotFoundError:
        return
    except OSError as error:
        logger.warning("%s cannot be removed and is left (%s); the next save tries again", checkpoint, error.strerror)
        return
    _delete(unwanted)


def _delete(unwanted: Path) -> None:
    try:
        if unwanted.is_symlink():
            leads_to = unwanted.readlink()
            unwanted.unlink()
            logger.warning("%s was a link: it is removed, %s, which it led to, stays", unwanted, leads_to)
        else:
            shutil.rmtree(unwanted)
    except OSError as error:
        logger.warning("%s cannot be removed and is left (%s); the next save tries again", unwanted, error.strerror)


def _free_name(wanted: Path) -> Path:
    """The name, with a number after it where it is taken."""
    free, number = wanted, 2
    while free.exists() or free.is_symlink():
        free, number = wanted.with_name(f"{wanted.name}_{number}"), number + 1
    return free


def _number(folder: Path) -> str:
    return folder.name.removeprefix("step_")
