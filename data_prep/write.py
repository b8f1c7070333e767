"""Writing of splits, and a folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from cola_megatron.data.manifest import MANIFEST_NAME, FileRecord, SplitRecord, sha256_of
from cola_megatron.data.shards import TOKENS_COLUMN, tokens_encoding
from cola_megatron.data.streaming_backend import MDSWriter
from data_prep.errors import DataPrepError
from data_prep.pack import SequencePacker

__all__ = ["SplitWriter", "file_records", "new_folder"]


class SplitWriter:
    """Packs the documents of one split and writes the sequences as MDS shards. A context manager.

    One shard is held in memory at a time. Leaving the block normally finishes the last shard and the index.
    """

    def __init__(self, folder: Path, sequence_length: int, token_dtype: str, shard_size_bytes: int) -> None:
        self._sequence_length = sequence_length
        self._packer = SequencePacker(sequence_length, token_dtype)
        self._writer = MDSWriter(
            columns={TOKENS_COLUMN: tokens_encoding(token_dtype, sequence_length)},
            out=str(folder),
            size_limit=shard_size_bytes,
            max_workers=1,  # its threads only upload to remote stores
        )
        self._documents = 0
        self._characters = 0
        self._sequences = 0

    def add(self, tokens: np.ndarray, characters: int) -> None:
        """Add one document: its tokens with the end-of-text id, shape (count,), and its length in characters."""
        self._documents += 1
        self._characters += characters
        for sequence in self._packer.add(tokens):
            self._writer.write({TOKENS_COLUMN: sequence})
            self._sequences += 1

    @property
    def record(self) -> SplitRecord:
        """What the split holds so far."""
        return SplitRecord(
            documents=self._documents,
            characters=self._characters,
            sequences=self._sequences,
            tokens=self._sequences * self._sequence_length,
            dropped_tokens=self._packer.remaining,
        )

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Not the writer's own __exit__, which would write another shard when the disk is already full, nor its
        # cancellation, which logs a traceback for every upload that was still queued.
        if error is None:
            self._finish()
        else:
            self._writer.executor.shutdown(wait=True)

    def _finish(self) -> None:
        """Write the last shard and the index."""
        writer = self._writer
        if writer.new_samples:
            writer.flush_shard()
            writer._reset_cache()
        # The writer queues an upload per shard even for a local folder, and looks only once a second whether the
        # queue is empty. With its one thread, a task that has run means that it is.
        writer.executor.submit(int).result()
        writer.finish()


def file_records(folder: Path) -> dict[str, FileRecord]:
    """Size and hash of every file below `folder` but the manifest, by relative path, in the order of the paths."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_NAME)
    return {
        path.relative_to(folder).as_posix(): FileRecord(bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in paths
    }


@contextlib.contextmanager
def new_folder(output: Path, replace: bool) -> Iterator[Path]:
    """A temporary folder beside `output`, renamed to it when the block ends well and removed when it does not.

    Args:
        output: folder to make; may exist if it is empty.
        replace: whether `output` may exist and hold files; it is put aside just before the rename, then removed.

    Yields:
        The temporary folder.

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


def _put_in_place(temporary: Path, output: Path, replace: bool) -> None:
    """Rename `temporary` to `output`; a folder that it replaces keeps its content until then."""
    if replace and output.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{output.name}.replaced-", dir=output.parent))
        output.rename(old)
        temporary.rename(output)
        shutil.rmtree(old)
    else:
        temporary.rename(output)
    _flush_one(output.parent)


def _flush_to_disk(folder: Path) -> None:
    """Force everything below `folder` to the disk, so that a crash after the rename cannot leave empty files."""
    for parent, _, names in os.walk(folder):
        for name in names:
            _flush_one(Path(parent, name))
        _flush_one(Path(parent))


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _cause_and_cure(error: OSError, output: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{output}: no space left on {output.parent}; free some or choose another --output (nothing was kept)"
    if error.errno == errno.ENOTEMPTY:
        return f"{output}: was filled by another process meanwhile; choose another --output or use --force"
    return f"{output}: cannot be written ({error.strerror}: {error.filename}); check the path and its rights"
