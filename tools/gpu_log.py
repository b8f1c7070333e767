"""What the GPU checks found, as lines of a file that a run which is cut off leaves whole, and as rows for docs/gpu.md.

The file has one JSON object a line, each with its `kind`: `begin` (date, machine, versions, command), `record`, `check`
(how long one took), `end`. A file without an `end` is of a run that was cut off; what it holds is true all the same.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType

    from tools.gpu_setting import Record


class RecordFile:
    """Appends to a file what is known so far, line by line; without a path it writes nothing.

    Every line is with the operating system before the next check begins: a process that is killed loses none.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any]):
        self.began = time.perf_counter()
        self._file: IO[str] | None = None if path is None else path.open("w")
        self._write("begin", about)

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._file is not None:
            self._file.close()

    def record(self, record: Record) -> None:
        """One figure."""
        self._write("record", asdict(record))

    def check(self, name: str, seconds: float) -> None:
        """A check is over."""
        self._write("check", {"name": name, "took": seconds})

    def end(self, failed: list[str]) -> None:
        """All checks are over."""
        self._write("end", {"failed": failed})

    def _write(self, kind: str, content: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        at = round(time.perf_counter() - self.began, 3)
        self._file.write(json.dumps({"kind": kind, "at": at, **content}) + "\n")
        self._file.flush()


@dataclass
class Log:
    """A file that `RecordFile` wrote."""

    about: dict[str, Any]
    records: list[Record] = field(default_factory=list)
    ended: bool = False
    """False: the run was cut off."""


def read_log(path: Path) -> Log:
    """What is in the file; a last line that was cut in the middle is left out.

    Raises:
        ValueError: the file is not one of these.
    """
    from tools.gpu_setting import Record

    log: Log | None = None
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        try:
            content = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines) - 1:
                break
            raise ValueError(f"{path}: line {number + 1} is not JSON") from None
        kind, _ = content.pop("kind", None), content.pop("at", None)
        if log is None:
            if kind != "begin":
                break
            log = Log(content)
        elif kind == "record":
            log.records.append(Record(**content))
        log.ended = kind == "end"
    if log is None:
        raise ValueError(f"{path}: does not begin as a file of `gpu_check --output` does")
    return log


def line(record: Record) -> str:
    """A record for people."""
    return f"{'ok    ' if record.ok else 'FAILED'} {record.name:<52} {figure(record):<27} {record.detail}"


def figure(record: Record) -> str:
    """Value and unit."""
    return "-" if record.value is None else f"{record.value:,.5g} {record.unit}"


def markdown_rows(records: list[Record], about: Mapping[str, Any]) -> list[str]:
    """Rows of the table in docs/gpu.md, of what passed and has a figure."""
    return [markdown_row(record, about) for record in records if record.ok and record.value is not None]


def markdown_row(record: Record, about: Mapping[str, Any]) -> str:
    """A row of the table in docs/gpu.md."""
    used = ", ".join(f"{name} {about['versions'][name]}" for name in ("torch", "cuda") if name in about["versions"])
    cells = (about["date"], about["machine"], used, f"`{about['command']}`", f"{record.name}: {figure(record)}")
    return f"| {' | '.join(cells)} |"
