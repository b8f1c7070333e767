"""`results.json` of a study, which `cola sweep collect` writes, as typed rows, and as `results.csv`."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from cola_megatron.errors import UserError
from cola_megatron.records.json_files import write_whole
from cola_megatron.studies.rows import (
    BUDGET_COLUMNS,
    Arm,
    Axis,
    Lost,
    Measure,
    Published,
    Results,
    Row,
    Sample,
    table,
)

RESULTS, TABLE = "results.json", "results.csv"


class DamagedResults(UserError):
    """`results.json` is not there, or says something that cannot be; one line."""


def read_results(folder: Path) -> Results:
    """The results of a study's folder.

    Raises:
        DamagedResults: there are none, or they cannot be read; one line.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise DamagedResults(f"{folder}: there is no {RESULTS}; `cola sweep collect {folder}` writes it")
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise DamagedResults(f"{path}: is no JSON ({error}); `cola sweep collect {folder}` writes it anew") from None
    try:
        return results_of(found)
    except _Wrong as error:
        raise DamagedResults(f"{path}: {error}; `cola sweep collect {folder}` writes it anew") from None


def write_table(folder: Path, results: Results) -> Path:
    """Writes every row of the table as FOLDER/results.csv and returns its path."""
    rows = table(results)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]) if rows else ["point"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path = folder / TABLE
    write_whole(path, buffer.getvalue())
    return path


def results_of(found: Any) -> Results:
    """The same from the file's content."""
    study = _object(_object(found, "the file").get("study"), "study")
    fit = _object(study.get("fit", {}), "study.fit")
    arms = {
        name: Arm(name, _text(value, "title", f"study.arms.{name}", name), _text(value, "family", "study.arms", ""))
        for name, value in _object(study.get("arms"), "study.arms").items()
    }
    axes = {
        name: Axis(name, _text(value, "title", f"study.axes.{name}", name), tuple(map(str, value.get("labels", []))))
        for name, value in _object(study.get("axes", {}), "study.axes").items()
    }
    rows = tuple(_row(value, index) for index, value in enumerate(_list(found.get("rows"), "rows")))
    names = [row.point for row in rows]
    for name in names:
        if names.count(name) > 1:
            raise _Wrong(f"rows: there are two points {name!r}")
    for row in rows:
        if row.arm not in arms:
            raise _Wrong(f"{row.point}: its arm {row.arm!r} is none of the study's ({', '.join(arms)})")
    column = _text(study, "budget_column", "study", "model")
    if column not in BUDGET_COLUMNS:
        raise _Wrong(f"study.budget_column: {column!r} is none of {', '.join(BUDGET_COLUMNS)}")
    spent = _object(study.get("spent", {}), "study.spent")
    return Results(
        name=_text(study, "name", "study"),
        title=_text(study, "title", "study", study.get("name")),
        question=_text(study, "question", "study", ""),
        scale=_text(study, "scale", "study", ""),
        budget_column=column,
        loss=_text(fit, "loss", "study.fit", "nats_per_token"),
        score=None if fit.get("score") is None else _text(fit, "score", "study.fit"),
        chance=_number(fit, "chance", "study.fit") or 0.0,
        arms=arms,
        axes=axes,
        published=tuple(_published(each) for each in _list(study.get("published", []), "study.published")),
        rows=rows,
        lost=tuple(
            Lost(_text(each, "point", "lost"), _text(each, "why", "lost", ""))
            for each in _list(found.get("lost", []), "lost")
        ),
        spent={role: _number(spent, role, "study.spent") or 0.0 for role in spent},
        notes=tuple(map(str, _list(study.get("notes", []), "study.notes"))),
    )


class _Wrong(Exception):
    """What is wrong, in words."""


def _row(value: Any, index: int) -> Row:
    place = f"rows[{index}]"
    point = _text(_object(value, place), "point", place)
    whole = {
        name: None if (number := _number(value, name, point)) is None else int(number)
        for name in ("step", "seed", "devices")
    }
    numbers = {name: _number(value, name, point) for name in ("budget", "tokens", "seconds", "device_hours", "mfu")}
    texts = {
        name: None if value.get(name) is None else _text(value, name, point)
        for name in ("error", "size", "stage_one", "trunk", "device")
    }
    settings = _object(value.get("settings") or {}, f"{point}: settings")
    return Row(
        point=point,
        run=_text(value, "run", point, point),
        state=_text(value, "state", point),
        arm=_text(value, "arm", point),
        settings={name: str(label) for name, label in settings.items()},
        parameters=_numbers(value, "parameters", point),
        compute=_numbers(value, "compute", point),
        stage_one_compute=_numbers(value, "stage_one_compute", point),
        measures=_measures(value.get("measures") or {}, point),
        curve=tuple(_curve_entry(each, point) for each in _list(value.get("curve") or [], f"{point}: curve")),
        samples=tuple(
            Sample(*(_text(each, name, f"{point}: samples", "") for name in ("prompt", "continuation", "original")))
            for each in _list(value.get("samples") or [], f"{point}: samples")
        ),
        step=whole["step"],
        seed=whole["seed"],
        devices=whole["devices"],
        budget=numbers["budget"],
        tokens=numbers["tokens"],
        seconds=numbers["seconds"],
        device_hours=numbers["device_hours"],
        mfu=numbers["mfu"],
        error=texts["error"],
        size=texts["size"],
        stage_one=texts["stage_one"],
        trunk=texts["trunk"],
        device=texts["device"],
    )


def _measures(found: Any, point: str) -> dict[str, Measure]:
    measures = {}
    for name, value in _object(found, f"{point}: measures").items():
        place = f"{point}: measures.{name}"
        number = _number(_object(value, place), "value", place)
        if number is None:
            continue
        items, kind = _number(value, "items", place), value.get("kind")
        error = _number(value, "error", place)
        measures[name] = Measure(
            number, error, None if kind is None else str(kind), None if items is None else int(items)
        )
    return measures


def _curve_entry(value: Any, point: str) -> tuple[int, str, float]:
    match value:
        case [int(step), str(name), int(number) | float(number)]:
            return step, name, float(number)
        case [int(step), str(name), None]:
            return step, name, math.nan
    raise _Wrong(f"{point}: curve: {value!r} is no step, name and value")


def _published(value: Any) -> Published:
    place = "study.published"
    numbers = {name: _number(_object(value, place), name, place) for name in ("compute", "score", "loss")}
    compute = numbers["compute"]
    if compute is not None and compute <= 0:
        raise _Wrong(f"{place}: compute must be above 0, and is {compute!r}")
    settings = _object(value.get("settings") or {}, f"{place}: settings")
    return Published(
        _text(value, "arm", place),
        _text(value, "column", place, "nominal"),
        compute,
        numbers["score"],
        numbers["loss"],
        {name: str(label) for name, label in settings.items()},
    )


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Wrong(f"{place}: must be an object")
    return value


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise _Wrong(f"{place}: must be a list")
    return value


def _text(value: Any, name: str, place: str, default: str | None = None) -> str:
    found = _object(value, place).get(name)
    found = default if found is None else found
    if not isinstance(found, str):
        raise _Wrong(f"{place}: {name} must be a text")
    return found


def _number(value: dict[str, Any], name: str, place: str) -> float | None:
    found = value.get(name)
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise _Wrong(f"{place}: {name} must be a number, and is {found!r}")
    return found


def _numbers(value: dict[str, Any], name: str, point: str) -> dict[str, float]:
    place = f"{point}: {name}"
    found = _object(value.get(name) or {}, place)
    numbers = {each: _number(found, each, place) for each in found}
    return {each: float(number) for each, number in numbers.items() if number is not None}
