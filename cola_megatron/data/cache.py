"""A bounded folder of shards on local disk, shared by all processes of a node."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from cola_megatron.data.manifest import ShardError

__all__ = ["DEFAULT_CACHE_BYTES", "ShardCache", "default_cache_folder"]

DEFAULT_CACHE_BYTES = 32 * 2**30
POLL_SECONDS = 0.05
STALLED_SECONDS = 300.0
"""A process that waits for another gives up when nothing has moved for so long."""

LOCK, PART = ".lock", ".part"
ENTRY = re.compile(rf"[0-9a-f]{{64}}({re.escape(PART)})?")


def default_cache_folder() -> Path:
    """One folder for each user where the machine keeps temporary files ($TMPDIR, else /tmp): local to the node."""
    return Path(tempfile.gettempdir()) / f"cola_megatron-{os.getuid()}"


class ShardCache:
    """Files by the SHA-256 of what they were made from, least recently used ones out first.

    A file gets its name when it is whole. While it is being made it is called NAME.part, already has its full size, and
    is locked by its maker: the sizes of all files together never exceed the limit, a second process that wants the same
    file waits for the first, and a part without a lock was left by a process that was killed. Locks are those of the
    kernel (`flock`), which end with their process. Other files in the folder are left alone.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        """
        Args:
            folder: on a disk of this node; made where it does not exist.
            limit: bytes of all shards in it, those being fetched included.

        Raises:
            ShardError: the folder cannot be made, or belongs to another user.
        """
        self.folder, self.limit = Path(folder).absolute(), limit
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner = self.folder.stat().st_uid
        except OSError as error:
            raise ShardError(
                f"{self.folder} cannot hold copies of shards ({error.strerror}); give data.cache_folder"
            ) from error
        if owner != os.getuid():
            raise ShardError(f"{self.folder} belongs to another user; give another data.cache_folder")

    def path(self, name: str, size: int, make: Callable[[IO[bytes]], None]) -> Path:
        """Where a file lies, made first where it is absent.

        Another process may push it out at any time: open it at once, and ask again where it is gone.

        Args:
            name: 64 hexadecimal digits.
            size: room that making it takes.
            make: fills a file from its beginning, or raises; the file ends where it leaves off.

        Raises:
            ShardError: there is no room, or another process makes no progress with it; and whatever `make` raises.
        """
        final, part = self.folder / name, self.folder / (name + PART)
        while not _touch(final):
            with _locked(part) as file:
                if final.exists():
                    part.unlink()
                    continue
                try:
                    self._make_room(part, file, size)
                    make(file)
                    file.truncate()
                    file.flush()
                    os.fsync(file.fileno())
                    with _locked(self.folder / LOCK):  # whoever adds up sizes finds it under one of its names
                        part.replace(final)
                except BaseException:
                    part.unlink(missing_ok=True)
                    raise
        return final

    def _make_room(self, part: Path, file: IO[bytes], size: int) -> None:
        """Give a part its full size, once enough else is gone."""
        began = time.monotonic()
        while True:
            with _locked(self.folder / LOCK):
                if self._evict(size, but=part):
                    os.ftruncate(file.fileno(), size)
                    return
            if time.monotonic() - began > STALLED_SECONDS:
                raise ShardError(
                    f"{self.folder} has no room for {size:,} bytes under data.cache_bytes={self.limit}: other "
                    "processes are fetching all of it; raise the limit"
                )
            time.sleep(POLL_SECONDS)

    def _evict(self, size: int, but: Path) -> bool:
        """Remove what killed processes left, and the least recently used files; whether there is room for `size`."""
        sizes, used = {}, {}
        for entry in os.scandir(self.folder):
            path = Path(entry.path)
            if not ENTRY.fullmatch(entry.name) or path == but or _remove_abandoned(path):
                continue
            with contextlib.suppress(FileNotFoundError):
                found = entry.stat()
                sizes[path], used[path] = found.st_size, found.st_mtime_ns
        total = sum(sizes.values())
        for path in sorted((path for path in sizes if path.suffix != PART), key=lambda path: used[path]):
            if total + size <= self.limit:
                break
            path.unlink()
            total -= sizes[path]
        return total + size <= self.limit


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """The file of that name, made where it is absent, with its lock; raises ShardError when its holder is stuck."""
    began = time.time()
    while True:
        with open(path, "r+b", opener=lambda name, _: os.open(name, os.O_RDWR | os.O_CREAT, 0o600)) as file:
            if _lock_now(file):
                if _is_at(path, file):
                    os.utime(file.fileno())
                    yield file
                    return
                continue  # renamed or removed by the one that had it
            moved = max(began, os.fstat(file.fileno()).st_mtime)
        if time.time() - moved > STALLED_SECONDS:
            raise ShardError(f"{path} is locked by a process that makes no progress; end it and run again")
        time.sleep(POLL_SECONDS)


def _lock_now(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise ShardError(
            f"{file.name}: this file system has no locks ({error.strerror}), which processes that share a cache need: "
            "give a data.cache_folder on a disk of the node"
        ) from None
    return True


def _is_at(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _remove_abandoned(path: Path) -> bool:
    """Remove a part that no process holds."""
    if path.suffix != PART:
        return False
    try:
        with path.open("rb") as file:
            if not _lock_now(file) or not _is_at(path, file):
                return False
            path.unlink()
    except FileNotFoundError:
        pass
    return True


def _touch(path: Path) -> bool:
    """Note the use of a file; False where it does not exist."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True
