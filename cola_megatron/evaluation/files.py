"""Rows of local data files: JSONL, JSON, CSV, parquet and Arrow. Nothing is downloaded."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cola_megatron.evaluation.errors import EvaluationError

Row = dict[str, Any]


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a file with their places ("FILE:LINE" or "FILE, row N"), by the file's suffix.

    Raises:
        EvaluationError: the file cannot be read as what its suffix says, or its suffix is unknown.
    """
    if path.suffix not in READERS:
        raise EvaluationError(f"{path}: not one of {', '.join(READERS)}")
    return READERS[path.suffix](path)


def read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    """One JSON object per line; empty lines are passed over.

    Lines end at line feeds alone: JSON strings may hold other line separators as they are.
    """
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        place = f"{path}:{number}"
        if line.strip():
            yield place, _object(place, _decoded(place, line))


def _read_json(path: Path) -> Iterator[tuple[str, Row]]:
    """A list of objects, the nested form of SQuAD's own files, or JSONL under another name."""
    try:
        document = json.loads(_decoded(str(path), path.read_bytes()))
    except json.JSONDecodeError:
        yield from read_jsonl(path)
        return
    if isinstance(document, dict) and isinstance(document.get("data"), list):
        document = _squad_rows(path, document["data"])
    elif isinstance(document, dict):
        document = [document]
    for number, row in enumerate(document if isinstance(document, list) else [document], 1):
        if not isinstance(row, dict):
            raise EvaluationError(f"{path}: holds neither an object per line nor a list of objects")
        yield f"{path}, row {number}", row


def _squad_rows(path: Path, articles: list[Any]) -> list[Row]:
    """The questions of SQuAD's own layout (articles, paragraphs, questions) under the hub's column names."""
    try:
        return [
            {
                "id": question["id"],
                "context": paragraph["context"],
                "question": question["question"],
                "answers": {"text": [answer["text"] for answer in question["answers"]]},
            }
            for article in articles
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (KeyError, TypeError) as error:
        raise EvaluationError(f"{path}: `data` is not SQuAD's list of articles ({error})") from None


def _read_csv(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                yield f"{path}:{reader.line_num}", row
        except (csv.Error, UnicodeDecodeError) as error:
            raise EvaluationError(f"{path}:{reader.line_num + 1}: not CSV ({error})") from None


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    from_arrow = _pyarrow(path)
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except from_arrow.ArrowInvalid as error:
        raise EvaluationError(f"{path}: not a parquet file ({_one_line(error)})") from None
    yield from _table_rows(path, table)


def _read_arrow(path: Path) -> Iterator[tuple[str, Row]]:
    """The stream that `datasets` writes to disk."""
    arrow = _pyarrow(path)
    import pyarrow.ipc

    try:
        table = pyarrow.ipc.open_stream(arrow.memory_map(str(path))).read_all()
    except arrow.ArrowInvalid as error:
        raise EvaluationError(f"{path}: not an Arrow stream ({_one_line(error)})") from None
    yield from _table_rows(path, table)


READERS = {
    ".jsonl": read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise EvaluationError(f"{path}: reading it needs pyarrow: make setup EXTRAS=eval") from None
    return pyarrow


def _table_rows(path: Path, table: Any) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"{path}, row {number}", row


def _decoded(place: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{place}: not UTF-8 (byte {error.start + 1})") from None


def _object(place: str, text: str) -> Row:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{place}: not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(row, dict):
        raise EvaluationError(f"{place}: a JSON object was expected, not {type(row).__name__}")
    return row


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
