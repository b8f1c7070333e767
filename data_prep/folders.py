"""Folders that appear whole or not at all, on the disk as well as in the file system."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cola_megatron.records.on_disk import flush
from data_prep.errors import DataPrepError

__all__ = ["new_folder", "place_folder", "remove_folder"]


@contextlib.contextmanager
def new_folder(output: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `output`, renamed to it when the block ends well and removed when it does not.

    Args:
        output: folder to make; may exist if it is empty.
        replace: whether `output` may exist and hold files; it is put aside just before the rename, then removed.

    Yields:
        The temporary folder, `.NAME.partial-*`: what a killed process leaves behind.

    Raises:
        DataPrepError: the disk is full, the place cannot be written to, or `output` was filled in the meantime.
    """
    temporary: Path | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp's folders are private
        _flush_to_disk(temporary)
        _put_in_place(temporary, output, replace)
    except OSError as error:
        raise DataPrepError(_cause_and_cure(error, output)) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def place_folder(finished: Path, output: Path, replace: bool) -> None:
    """Renames a finished folder of the same file system to `output`; `replace` as in `new_folder`.

    Raises:
        DataPrepError: `output` holds something, or cannot be written.
    """
    try:
        _put_in_place(finished, output, replace)
    except OSError as error:
        raise DataPrepError(_cause_and_cure(error, output)) from error


def remove_folder(folder: Path) -> None:
    """Removes a folder; what cannot be removed, a file that another process holds on NFS, is no longer in its place."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        with contextlib.suppress(OSError):
            aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.removed-", dir=folder.parent))
            folder.rename(aside)


def _put_in_place(temporary: Path, output: Path, replace: bool) -> None:
    """Renames `temporary` to `output`; a folder that it replaces keeps its content until then. Raises OSError."""
    if replace and output.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{output.name}.replaced-", dir=output.parent))
        output.rename(old)
        temporary.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(output)
    flush(output.parent)


def _flush_to_disk(folder: Path) -> None:
    """Force everything below `folder` to the disk, so that a crash after the rename cannot leave empty files."""
    for parent, _, names in os.walk(folder):
        for name in names:
            flush(Path(parent, name))
        flush(Path(parent))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _cause_and_cure(error: OSError, output: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{output}: no space left on {output.parent}; free some, then run again (finished tasks are kept)"
    if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
        return f"{output}: was filled by another process meanwhile; choose another --output or use --force"
    return f"{output}: cannot be written ({error.strerror}: {error.filename}); check the path and its rights"
