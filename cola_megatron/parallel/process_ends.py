"""Learns at once that a process of this machine ended, also one that was killed."""

import contextlib
import functools
import os
import select
from pathlib import Path

from cola_megatron.parallel.heartbeats import Heartbeat


@functools.cache
def this_machine() -> str:
    """The same in two processes that can see each other: one boot of one kernel, one space of process numbers."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


class ProcessEnds:
    """Handles to processes, and a wait that ends when one of them does.

    `wait` and `follow` belong to one thread, `wake` and `ended` to any; `close` comes after all of them.
    """

    def __init__(self) -> None:
        self._handles: dict[int, int] = {}
        self._followed: set[int] = set()
        self._ended: set[int] = set()
        self._woken, self._wake = os.pipe()

    def follow(self, beat: Heartbeat) -> None:
        """From here on the end of this rank's process is noticed, if it runs on this machine."""
        if beat.rank in self._followed or beat.machine != this_machine():
            return
        self._followed.add(beat.rank)
        try:
            self._handles[beat.rank] = os.pidfd_open(beat.process)
        except ProcessLookupError:
            self._ended.add(beat.rank)
        except (AttributeError, OSError):
            return  # an older kernel, or a sandbox that forbids it: the heartbeats alone must do

    def ended(self, within: float = 0.0) -> set[int]:
        """The followed ranks whose processes have ended; waits so many seconds for one that has not yet."""
        alive = {handle: rank for rank, handle in self._handles.items() if rank not in self._ended}
        self._ended.update(alive[handle] for handle in _readable(list(alive), within))
        return set(self._ended)

    def wait(self, seconds: float) -> None:
        """Waits that long, but not beyond `wake` or the end of a process that was alive."""
        alive = [handle for rank, handle in self._handles.items() if rank not in self._ended]
        if self._woken in _readable([self._woken, *alive], seconds):
            os.read(self._woken, 4096)

    def wake(self) -> None:
        """Ends the present or the next `wait`."""
        with contextlib.suppress(OSError):  # nobody waits any more
            os.write(self._wake, b".")

    def close(self) -> None:
        """Gives the handles back."""
        for descriptor in [*self._handles.values(), self._woken, self._wake]:
            os.close(descriptor)
        self._handles.clear()


def _readable(descriptors: list[int], seconds: float) -> list[int]:
    if not descriptors:
        return []
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll(seconds * 1000)]
