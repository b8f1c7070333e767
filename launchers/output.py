"""What the commands print."""

import os
import sys
from typing import Any


def fail(message: str, code: int) -> int:
    """Prints one line on stderr and returns the exit code."""
    print(f"cola: {message}", file=sys.stderr)
    return code


def print_json(value: Any) -> None:
    """One JSON document on stdout, for scripts and strict readers: a number that is not finite is null."""
    from cola_megatron.records.json_files import to_json

    if not _has_the_say():
        return
    print(to_json(value, indent=1, default=str))


def print_table(rows: list[tuple[str, str]], title: str | None = None) -> None:
    """Two aligned columns on stdout."""
    if not _has_the_say():
        return
    if title:
        print(f"\n{title}")
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


def _has_the_say() -> bool:
    """Of the processes of one command (`cola launch`, torchrun) one gives the answer."""
    return int(os.environ.get("RANK", 0)) == 0
