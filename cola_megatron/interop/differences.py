"""What differs between two trees of plain values."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

ABSENT = "absent"


class Unequal(NamedTuple):
    """A named value that differs."""

    name: str
    first: Any
    second: Any


def unequal(prefix: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Unequal]:
    """Every key that differs, with its dotted name behind the prefix."""
    for key in sorted(first.keys() | second.keys()):
        ours, theirs = first.get(key, ABSENT), second.get(key, ABSENT)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            yield from unequal(f"{prefix}{key}.", ours, theirs)
        elif ours != theirs:
            yield Unequal(f"{prefix}{key}", ours, theirs)
