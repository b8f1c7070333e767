"""Shared memory, open files, cores, and the disk that runs are written to."""

import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

from cola_megatron.preflight.check import Check, Status

GIB = 2**30
SHARED_MEMORY = Path("/dev/shm")
PROBE_BYTES, PIECE_BYTES = 64 * 2**20, 8 * 2**20
PROBE_SECONDS = 5.0
LEAST_SHARED_MEMORY, LEAST_FREE, LEAST_SPEED = GIB, 10 * GIB, 50 * 2**20
LEAST_OPEN_FILES = 4096


def machine_checks(runs_folder: Path) -> list[Check]:
    """What training needs of this machine; writes 64 MiB into the folder of the runs, and removes them."""
    return [_cores(), _shared_memory(), _open_files(), *_disk(runs_folder)]


def _cores() -> Check:
    usable, there = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    if usable == 1 and there > 1:
        cure = "the job sees one core: ask for more (cpus_per_node of the site file)"
        return Check("cores", Status.WARNING, f"1 of {there}", cure)
    return Check("cores", Status.OK, f"{usable} of {there}")


def _shared_memory() -> Check:
    if not SHARED_MEMORY.is_dir():
        return Check("shared memory", Status.FAILED, f"no {SHARED_MEMORY}", "mount it into the container")
    usage = shutil.disk_usage(SHARED_MEMORY)
    value = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    if usage.free < LEAST_SHARED_MEMORY:
        cure = "loader workers hand batches over there: give the container more (--shm-size), or loader_workers=0"
        return Check("shared memory", Status.WARNING, value, cure)
    return Check("shared memory", Status.OK, value)


def _open_files() -> Check:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < LEAST_OPEN_FILES:
        return Check(
            "open files", Status.WARNING, str(limit), f"`ulimit -n {LEAST_OPEN_FILES}` before the job, or more"
        )
    return Check("open files", Status.OK, "no limit" if limit == resource.RLIM_INFINITY else str(limit))


def _disk(folder: Path) -> list[Check]:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    cure = "" if free >= LEAST_FREE else "make room, or set runs_folder to another disk"
    space = Check("disk space", Status.WARNING if cure else Status.OK, f"{free / GIB:.1f} GiB free in {existing}", cure)
    try:
        speed = write_speed(existing)
    except OSError as error:
        why = f"{existing}: {error.strerror}"
        return [space, Check("disk", Status.FAILED, why, "runs cannot be written there: set runs_folder to another")]
    slow = speed < LEAST_SPEED
    cure = "checkpoints will take long: is this the parallel file system?" if slow else ""
    return [space, Check("disk speed", Status.WARNING if slow else Status.OK, f"{speed / 2**20:.0f} MiB/s", cure)]


def write_speed(folder: Path) -> float:
    """Bytes/s at which a file in the folder reaches the disk: at most 64 MiB or 5 s. Raises OSError."""
    piece = os.urandom(PIECE_BYTES)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
        began, written = time.monotonic(), 0
        while written < PROBE_BYTES and time.monotonic() - began < PROBE_SECONDS:
            file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            written += PIECE_BYTES
        return written / (time.monotonic() - began)
