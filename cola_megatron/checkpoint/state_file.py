"""state.json: what a checkpoint says of itself, with the checksums of the rest."""

import json
import zlib
from pathlib import Path
from typing import Any

from cola_megatron.checkpoint.errors import CheckpointError, DamagedCheckpoint
from cola_megatron.checkpoint.sharded_tensors import INDEX, StoredTensors
from cola_megatron.config import RunConfig, stored_config
from cola_megatron.records.on_disk import flush

STATE, TENSORS = "state.json", "tensors"
_FORMAT, _INDEX_CRC32, _STATE_CRC32 = "format", "index_crc32", "state_crc32"

FORMAT = 1
"""Of state.json and of the tensors beside it: one more with each change that a version before it cannot read. The
schema of the config is a number of its own, in the config."""


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


def read_config(checkpoint: Path) -> RunConfig:
    """The config of a checkpoint that any version wrote.

    Raises:
        DamagedCheckpoint: no good state. ConfigError: a newer version wrote it, or there is no such model any more.
    """
    return stored_config(read_state(checkpoint)["config"], checkpoint)


def open_tensors(checkpoint: Path) -> StoredTensors:
    """The tensors of a checkpoint, for reading; raises DamagedCheckpoint."""
    return StoredTensors(checkpoint / TENSORS, read_state(checkpoint).get(_INDEX_CRC32))


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Completes a checkpoint whose other files are there with state.json, which also gets sizes and checksums."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    state = {**state, _FORMAT: FORMAT, "files": sizes}
    state[_INDEX_CRC32] = zlib.crc32((folder / TENSORS / INDEX).read_bytes())
    (folder / STATE).write_text(json.dumps({**state, _STATE_CRC32: _checksum(state)}, indent=1) + "\n")
    flush(folder / STATE)
    flush(folder)


def _checksum(state: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())
