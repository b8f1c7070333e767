"""Output that nobody reads any more (a pipe whose reader has ended, a terminal that was closed) ends no work.

The numbers of a run are in its folder; what it prints beside them may go.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

_NOBODY_READS = (errno.EPIPE, errno.EIO)


class Output:
    """A text stream that may lose its reader: what is printed from then on goes nowhere.

    Args:
        ends: end the process with 0 instead, as there is nothing left to do for a command that prints its answer. An
            error other than a lost reader, such as a full disk, is raised then; else it is passed over.
    """

    def __init__(self, stream: TextIO, ends: bool = False):
        self._stream, self._ends = stream, ends

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of a file."""
        with self._passing_over_errors():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As of a file."""
        with self._passing_over_errors():
            self._stream.flush()

    @contextlib.contextmanager
    def _passing_over_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            unread = error.errno in _NOBODY_READS
            if unread:
                self._into_nothing()
            if self._ends:
                if not unread:
                    raise
                raise SystemExit(0) from None

    def _into_nothing(self) -> None:
        """For all who write there: loggers have the stream itself, libraries its number."""
        with contextlib.suppress(OSError, ValueError):  # a stream that is no file
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)


@contextlib.contextmanager
def outliving_its_readers() -> Iterator[None]:
    """Lets nothing in the block fail because of what becomes of standard output and standard error."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = streams
