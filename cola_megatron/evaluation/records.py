"""The records of a running evaluation: one JSONL file per rank, appended to batch by batch.

A record is {"id", "prompt_hash", "prompt_tokens" (where the model counts them), "generation", "answer", "ground_truth",
"choices" (where there are any), "correct"}.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cola_megatron.evaluation.errors import EvaluationError
from cola_megatron.evaluation.items import Item
from cola_megatron.evaluation.scoring import Verdict
from cola_megatron.records.json_files import as_lines, write_json

Record = dict[str, Any]
SETTINGS = "settings.json"
ADDED = {
    "model.precision": "fp32",
    "model.noise": "published",
    "model.settle_every": 0,
    "decoding.until_end_of_text": False,
}
"""Settings that evaluations of older versions did not name, with what they computed."""


def make_record(item: Item, generation: str, verdict: Verdict, prompt_tokens: int | None = None) -> Record:
    """What is kept of one item."""
    return {
        "id": item.id,
        "prompt_hash": item.prompt_hash,
        **({} if prompt_tokens is None else {"prompt_tokens": prompt_tokens}),
        "generation": generation,
        "answer": verdict.answer,
        "ground_truth": item.truths[0] if len(item.truths) == 1 else list(item.truths),
        **({"choices": list(item.options)} if item.options else {}),
        "correct": verdict.correct,
    }


def as_stored(value: Any) -> Any:
    """The value as it will be read back: tuples become lists."""
    return json.loads(json.dumps(value))


def start_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Writes the settings of an evaluation that begins in this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / SETTINGS).exists():
        write_json(folder / SETTINGS, settings)


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raises EvaluationError where the evaluation in this folder was begun with other settings."""
    path = folder / SETTINGS
    try:
        begun = json.loads(path.read_text())
    except json.JSONDecodeError:
        raise EvaluationError(f"{path}: damaged; give a new --output folder") from None
    now = _flat(settings)
    then = {name: value for name, value in ADDED.items() if name in now} | _flat(begun)
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            raise EvaluationError(
                f"{folder} was begun with {name}={then.get(name)}, not {now.get(name)}: give a new --output folder"
            )


def read_records(folder: Path, items: Sequence[Item]) -> dict[int | str, Record]:
    """The records of these items that any rank has written, by id; a half-written last line is passed over.

    Raises:
        EvaluationError: a line is damaged, or an item was asked with another prompt.
    """
    hashes = {item.id: item.prompt_hash for item in items}
    found: dict[int | str, Record] = {}
    for path in sorted(folder.glob("records_rank_*.jsonl")):
        lines = path.read_bytes().split(b"\n")[:-1]
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                record_id, prompt_hash = record["id"], record["prompt_hash"]
            except (ValueError, KeyError, TypeError):
                raise EvaluationError(f"{path}:{number}: damaged; remove the line to evaluate its item again") from None
            if record_id not in hashes:
                continue
            if prompt_hash != hashes[record_id]:
                raise EvaluationError(
                    f"{path}:{number}: item {record_id} was asked with another prompt: give a new --output folder"
                )
            found[record_id] = record
    return found


def drop_half_line(path: Path) -> None:
    """Takes away what a kill left of the last line, so that records can be appended."""
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def append_records(path: Path, records: Sequence[Record]) -> None:
    """Adds a line per record."""
    with path.open("a") as file:
        file.write(as_lines(records))


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
