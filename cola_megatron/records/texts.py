"""texts.jsonl: what the model wrote of held-out texts at each measurement, one object per line.

`kind` is "continuations" or "reconstructions"; `texts` are those of `held_out.texts`, always the same ones.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cola_megatron.records.json_files import as_lines
from cola_megatron.records.metrics import drop_after, readable_metrics
from cola_megatron.records.on_disk import flush

TEXTS = "texts.jsonl"


class TextsLog:
    """Appends to texts.jsonl of a run. A resumed run first drops what came after its checkpoint."""

    def __init__(self, run_folder: Path, resumed_at: int):
        self._path = run_folder / TEXTS
        drop_after(self._path, resumed_at)

    def write(self, kind: str, step: int, texts: Sequence[dict[str, Any]]) -> None:
        """What was written after a step (counted from 1)."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(as_lines([{"kind": kind, "step": step, "texts": texts}]))
        flush(self._path)


def readable_texts(run_folder: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The records, of each step the last, and the numbers of the lines that are none.

    A job that dies between its texts and the record of its measurement leaves both to the next.
    """
    path = run_folder / TEXTS
    if not path.is_file():
        return [], []
    records, damaged = readable_metrics(path, is_record=_has_texts)
    return list({record["step"]: record for record in records}.values()), damaged


def _has_texts(record: dict[str, Any]) -> bool:
    texts = record.get("texts")
    return isinstance(texts, list) and all(isinstance(text, dict) for text in texts)
