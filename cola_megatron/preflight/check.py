"""What one look at a machine or an installation found."""

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How it is."""

    OK = "ok"
    NOTE = "note"
    """Worth knowing; nothing is wrong."""
    WARNING = "warning"
    FAILED = "failed"
    """Training would fail, or be far too slow."""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: Status
    value: str
    cure: str = ""
    """What to do about it; empty where nothing is to be done."""
    node: str = ""
    """Of a job on several nodes."""
