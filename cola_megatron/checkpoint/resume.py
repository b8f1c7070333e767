"""What a run goes on from: its newest checkpoint that is whole."""

import logging
from functools import partial
from pathlib import Path

from cola_megatron.checkpoint.compatible import check_checkpoint
from cola_megatron.checkpoint.errors import CheckpointError, DamagedCheckpoint
from cola_megatron.checkpoint.folder import checkpoints_folder, move_aside, set_aside, step_folders, step_of
from cola_megatron.checkpoint.state_file import open_tensors, read_state
from cola_megatron.config import RunConfig
from cola_megatron.parallel import ProcessGroups
from cola_megatron.parallel.consensus import from_main, together
from cola_megatron.records.run_folder import finished_summary

logger = logging.getLogger(__name__)


def resume_from(config: RunConfig, data_fingerprint: str, groups: ProcessGroups) -> tuple[Path | None, int]:
    """The checkpoint that a run goes on from and its step, or (None, 0) where there is none; all ranks call it.

    The newest checkpoint is verified whole. If it is damaged, the one before is tried, and so on; when one is good, the
    damaged ones are moved aside as `damaged_step_*`, and the main process warns with one line. Nothing is deleted, and
    nothing is moved where no checkpoint is good. The caller holds the lock of the run folder.

    Verifying reads every byte once before loading reads what it needs: each rank an even share, so the size of the
    checkpoint over the number of ranks, and loading then finds part of it in the page cache. Of a finished run, where
    nothing is left to do, the tensors are not read.

    Raises:
        CheckpointError: another config, other data, no good checkpoint among those that there are, or
            training.resume=never where there are any; the same on every rank.
    """
    folder = checkpoints_folder(config.run_folder)
    found, aside = from_main(groups, lambda: (step_folders(config.run_folder), set_aside(config.run_folder)))
    if found and config.training.resume == "never":
        raise CheckpointError(f"{config.run_folder} holds checkpoints and training.resume=never; use another name=")
    damaged: list[tuple[Path, str]] = []
    for checkpoint in reversed(found):
        try:
            together(groups, partial(_check, checkpoint, config, data_fingerprint, groups))
        except DamagedCheckpoint as error:
            damaged.append((checkpoint, error.reason))
            continue
        if damaged:
            from_main(groups, partial(_go_back, damaged, checkpoint))
        return checkpoint, step_of(checkpoint)
    if found or aside:
        reason = f"of the newest, {damaged[0][1]}" if damaged else ", ".join(path.name for path in aside)
        raise CheckpointError(
            f"{folder} holds damaged checkpoints only ({reason}); bring one back from a copy, or give another name= or "
            f"delete {folder} to start from the beginning"
        )
    return None, 0


def verify_checkpoint(checkpoint: Path, reader: int = 0, readers: int = 1) -> None:
    """Reads one of `readers` even shares of a checkpoint and compares it with what was written.

    Raises:
        DamagedCheckpoint: a file is missing, cut short, unreadable or not what was written.
    """
    sizes = sorted(read_state(checkpoint)["files"].items())
    for name, size in sizes[reader::readers]:
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            raise DamagedCheckpoint(f"{path} is missing or cut short")
    open_tensors(checkpoint).verify(reader, readers)


def _check(checkpoint: Path, config: RunConfig, data_fingerprint: str, groups: ProcessGroups) -> None:
    step = check_checkpoint(checkpoint, config, data_fingerprint)
    if step != step_of(checkpoint):
        raise DamagedCheckpoint(f"{checkpoint} holds step {step}")
    if finished_summary(config, step) is None:
        verify_checkpoint(checkpoint, groups.rank, groups.world_size)


def _go_back(damaged: list[tuple[Path, str]], good: Path) -> None:
    newest, reason = damaged[0]
    try:
        aside = [move_aside(checkpoint).name for checkpoint, _ in damaged]
    except OSError as error:
        raise CheckpointError(f"{reason}; it cannot be moved aside ({error}): move it away, and run again") from error
    logger.warning(
        "damaged checkpoints: %s; moved aside as %s, resuming from %s instead, %d steps are lost",
        reason if len(damaged) == 1 else f"{len(damaged)}, of the newest {reason}",
        ", ".join(aside),
        good.name,
        step_of(newest) - step_of(good),
    )
