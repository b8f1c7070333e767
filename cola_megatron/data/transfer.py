"""Reading files behind fsspec URLs: retries where another try may help, one line where none does."""

from __future__ import annotations

import errno
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, TypeVar

import fsspec

from cola_megatron.data.manifest import BadShardError, FileRecord, ShardError

__all__ = ["copy_verified", "is_url", "retrying"]

ATTEMPTS = 5
FIRST_PAUSE_SECONDS = 0.5
"""Doubled after each attempt."""
CHUNK_BYTES = 4 * 2**20
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")


class _DamagedError(Exception):
    """What arrived is not what the manifest says; the message is the predicate."""


def is_url(place: str | Path) -> bool:
    """Whether a place is an fsspec URL and not a path."""
    return "://" in str(place)


def copy_verified(source: str, record: FileRecord, target: IO[bytes]) -> None:
    """Write what a path or URL holds to the beginning of a file, and compare size and SHA-256.

    Raises:
        BadShardError: the source is missing, or not what the record says.
        ShardError: it cannot be reached, or there is no room for it.
    """

    def copy() -> None:
        target.seek(0)
        digest, size = hashlib.sha256(), 0
        with fsspec.open(source, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                size += len(chunk)
                if size > record.bytes:
                    raise _DamagedError(f"has more than the {record.bytes:,} bytes that its manifest says")
                target.write(chunk)
                digest.update(chunk)
        if size != record.bytes:
            raise _DamagedError(f"has {size:,} bytes, not {record.bytes:,} as its manifest says")
        if digest.hexdigest() != record.sha256:
            raise _DamagedError("is damaged: its SHA-256 is not the one in the manifest")

    retrying(source, copy)


def retrying(source: str, action: Callable[[], T]) -> T:
    """Call `action`, which reads `source`, until it succeeds; a local path gets one attempt.

    Raises:
        BadShardError: the source does not exist, or what arrived was wrong each time.
        ShardError: it could not be reached, or the disk that it is copied to is full.
    """
    attempts = ATTEMPTS if is_url(source) else 1
    for attempt in range(attempts):
        if attempt:
            time.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
        try:
            return action()
        except (FileNotFoundError, IsADirectoryError) as error:
            raise BadShardError(f"{source} is missing") from error
        except PermissionError as error:
            raise ShardError(f"{source} may not be read ({_line(error)}); check the credentials") from error
        except (ImportError, ValueError) as error:  # a protocol that is unknown, or whose client is not installed
            raise ShardError(f"{source} cannot be opened: {_line(error)}") from error
        except Exception as error:  # clients of object stores have error classes of their own
            if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
                raise ShardError(
                    f"the disk is full while {source} is copied to it; lower data.cache_bytes, or give a "
                    "data.cache_folder on a larger disk"
                ) from error
            failure = error
    if isinstance(failure, _DamagedError):
        raise BadShardError(f"{source} {failure}") from failure
    raise ShardError(
        f"{source} cannot be read after {attempts} attempt{'s' * (attempts > 1)} ({_line(failure)}); check that it can "
        "be reached from this machine, and run again"
    ) from failure


def _line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
