"""Which checkpoint a folder stands for."""

from pathlib import Path

from cola_megatron.checkpoint.errors import CheckpointError
from cola_megatron.checkpoint.folder import step_folders
from cola_megatron.checkpoint.state_file import STATE


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The complete checkpoint with the highest step, or None. A folder a kill left half-written is not one."""
    complete = [path for path in step_folders(run_folder) if (path / STATE).is_file()]
    return complete[-1] if complete else None


def require_checkpoint(run_folder: Path) -> Path:
    """The newest checkpoint of a run folder, or the folder itself where it is one; raises CheckpointError."""
    if (run_folder / STATE).is_file():
        return run_folder
    checkpoint = newest_checkpoint(run_folder)
    if checkpoint is None:
        raise CheckpointError(f"{run_folder} holds no complete checkpoint; train it first, or check the path")
    return checkpoint
