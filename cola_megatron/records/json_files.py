"""JSON of a run folder: written whole or not at all, for strict readers; read whatever a kill or a full disk left.

These files inform: a damaged one never ends a run. `set_aside` keeps it, under another name and with a line in the log.
"""

import json
import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cola_megatron.records.on_disk import flush

logger = logging.getLogger(__name__)

IsRecord = Callable[[dict[str, Any]], bool]


def to_json(value: Any, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """JSON for any reader: a number that is not finite becomes null, since JSON knows no other way to say so.

    Args:
        default: as of `json.dumps`, for what is no value of JSON.
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False, default=default)


def write_json(path: Path, value: Any) -> None:
    """Writes a whole document or nothing."""
    write_whole(path, to_json(value, indent=1) + "\n")


def write_whole(path: Path, text: str, durable: bool = True) -> None:
    """Writes a whole file or nothing: who reads it meanwhile, or after a power cut, finds the old one.

    Args:
        durable: False for what is written again every second: without waiting for the disk.
    """
    unfinished = path.with_name(f".{path.name}.writing")
    unfinished.write_text(text, encoding="utf-8")
    if durable:
        flush(unfinished)
    unfinished.replace(path)
    if durable:
        flush(path.parent)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; nothing where there is no file, or where it holds no such thing."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def set_aside_if_damaged(path: Path) -> None:
    """Moves a file in which there is no object out of the way, with one line."""
    if path.is_file() and not read_object(path):
        aside = path.with_name(f"damaged_{path.name}")
        path.replace(aside)
        logger.warning("%s cannot be read: moved aside as %s, and begun anew", path, aside.name)


def read_lines(path: Path, is_record: IsRecord) -> tuple[list[dict[str, Any]], list[int]]:
    """The records of a file of one object per line, and the numbers (from 1) of the lines that are none.

    A last line without an end is neither: it is being written, or a kill cut it short.
    """
    records, damaged = [], []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and is_record(record):
            records.append(record)
        else:
            damaged.append(number)
    return records, damaged


def repair_lines(path: Path, is_record: IsRecord, keep: IsRecord = lambda record: True) -> list[dict[str, Any]]:
    """Brings such a file into a state that can be appended to, and returns its records; nothing where there is none.

    What a kill left of a last line goes, and damaged lines go into `damaged_NAME` beside it, with a line in the log.

    Args:
        keep: of a record, whether it stays in the file.
    """
    if not path.is_file():
        return []
    records, damaged = read_lines(path, is_record)
    if damaged:
        lines = path.read_bytes().splitlines(keepends=True)
        aside = path.with_name(f"damaged_{path.name}")
        with aside.open("ab") as file:
            file.writelines(lines[number - 1] for number in damaged)
        logger.warning("%s: %d lines cannot be read: moved to %s", path, len(damaged), aside.name)
    kept = [record for record in records if keep(record)]
    write_whole(path, as_lines(kept))
    return kept


def as_lines(records: Iterable[dict[str, Any]]) -> str:
    """One object per line."""
    return "".join(to_json(record) + "\n" for record in records)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
