"""What can be wrong with data, raised where it is found; `read_part` decides whether it ends the run."""

from __future__ import annotations

__all__ = ["BadRecord", "DamagedFile", "one_line", "printable"]


class BadRecord(Exception):
    """One record is no document; the next one can be read."""

    def __init__(self, rule: str, message: str, position: int = 0) -> None:
        super().__init__(message)
        self.rule = rule
        """See `BadDocument.rule`."""
        self.position = position
        """The byte of the record that is wrong, where one is."""


class DamagedFile(Exception):
    """A compressed file, archive or table is cut or corrupt: nothing after this can be read."""


def printable(name: str) -> str:
    """A name of a file system or archive that may be no UTF-8, which Python keeps as surrogates, as text."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def one_line(error: Exception) -> str:
    """What an exception of a library says, without what it says below its first line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
