"""A bound of the work for one document, so that no document stalls a task, whatever a rule makes of it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["TooSlow", "limited"]

# The slowest rules take a second for a million characters; a document has a hundred times that, and time to load what
# a first one loads.
SECONDS = 20.0
CHARACTERS_PER_SECOND = 10_000


class TooSlow(Exception):
    """The rules have taken longer for one document than any sound document needs."""


@contextmanager
def limited(characters: int) -> Iterator[None]:
    """Raises TooSlow where the block takes too long for a document of so many characters.

    It counts the time that this process computes: a machine that is busy or stands still removes no document. Only the
    main thread of a process can be bounded, which is where tasks run.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS + characters / CHARACTERS_PER_SECOND)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
