"""From the folders of a study to its table: results.json, a row for every point, whatever is missing in it.

docs/scaling.md describes the columns. Nothing is computed here but costs: what was measured is read.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from cola_megatron.checkpoint.find import require_checkpoint
from cola_megatron.checkpoint.state_file import STATE, read_config, read_state
from cola_megatron.config import RunConfig
from cola_megatron.errors import UserError
from cola_megatron.families import family_of
from cola_megatron.planning.compute import COLUMNS, compute_of, parameters_of
from cola_megatron.planning.hardware import gpu_of_device
from cola_megatron.records.goodput import read_attempts
from cola_megatron.records.json_files import write_json
from cola_megatron.reporting.run_records import Run, read_run
from cola_megatron.studies.folder import StudyFolder
from cola_megatron.studies.measured import Measure, measures_in
from cola_megatron.studies.results import RESULTS, read_results, write_table
from cola_megatron.studies.runs import Point, StudyRun

_ERROR = "_standard_error"


def collect(opened: StudyFolder, state_of: Callable[[str], tuple[str, str]] | None = None) -> dict[str, Any]:
    """The document, and writes it into the folder.

    Args:
        state_of: the state and last error of a run, by its name; None: as its folder alone says.
    """
    state_of = state_of or (lambda name: (opened.state_of(name), opened.error_of(name)))
    # Points of one run or trunk follow each other; all at once, the records of long runs may not fit the memory.
    records = functools.lru_cache(maxsize=4)(functools.partial(_records, opened))
    rows = [_Row(opened, point, state_of, records).as_json() for point in opened.expanded.points]
    lost = [{"point": row["point"], "why": row["error"]} for row in rows if row["state"] != "finished"]
    document = {"study": _study(opened), "rows": rows, "lost": lost}
    write_json(opened.folder / RESULTS, document)
    write_table(opened.folder, read_results(opened.folder))
    return document


def _study(opened: StudyFolder) -> dict[str, Any]:
    study, runs = opened.study, opened.expanded.runs
    first_of = {point.arm: runs[point.run].config for point in reversed(opened.expanded.points)}
    return {
        "name": study.name,
        "title": study.title or study.name,
        "question": study.question,
        "scale": study.scale,
        "budget_column": study.budgets.column,
        "budgets": sorted(study.budgets.amounts),
        "with_stage_one": study.budgets.with_stage_one,
        "runs": study.budgets.runs,
        "seeds": study.seeds,
        "fit": study.fit.model_dump(mode="json"),
        "arms": {
            name: {"title": arm.title or name, "family": family_of(first_of[name]).name}
            for name, arm in study.arms.items()
        },
        "axes": {
            name: {"title": axis.title or name, "labels": list(axis.settings)} for name, axis in study.axes.items()
        },
        "published": [point.model_dump(mode="json") for point in study.published],
        "spent": _spent(opened),
        "notes": _notes(opened),
    }


def earlier_compute(config: RunConfig) -> dict[str, float] | None:
    """What the run cost that a config starts from by a path of its own; None: it starts from none, or nobody knows."""
    given = getattr(config.training, "stage_one", None)
    if given is None:
        return None
    try:
        checkpoint = require_checkpoint(given)
        return compute_of(read_config(checkpoint), read_state(checkpoint)["step"])
    except UserError:  # such as a published model
        return None


def _notes(opened: StudyFolder) -> list[str]:
    """What a reader of the costs must know."""
    notes = {}
    for point in opened.expanded.points:
        config = opened.expanded.runs[point.run].config
        given = getattr(config.training, "stage_one", None)
        if point.stage_one is None and given is not None and earlier_compute(config) is None:
            notes[point.arm] = f"What {given} cost, which {point.arm} starts from, is not known and not charged."
    return list(notes.values())


def _spent(opened: StudyFolder) -> dict[str, float]:
    """Device-hours by role, each run once."""
    hours = {"stage_one": 0.0, "trunk": 0.0, "run": 0.0}
    for run in opened.expanded.runs.values():
        folder = opened.run_folder(run.name)
        attempts = read_attempts(folder)
        if attempts:
            with contextlib.suppress(UserError):  # the point that needs it says so
                hours[run.role] += (read_run(folder).cost().seconds or 0.0) * attempts[-1].get("processes", 1) / 3600
    return hours


def _records(opened: StudyFolder, name: str) -> tuple[Run | None, str]:
    """What a run left, and else why it cannot be read."""
    folder = opened.run_folder(name)
    if not folder.is_dir():
        return None, ""
    try:
        return read_run(folder), ""
    except UserError as error:
        return None, str(error)


class _Row:
    """One point."""

    def __init__(
        self,
        opened: StudyFolder,
        point: Point,
        state_of: Callable[[str], tuple[str, str]],
        records: Callable[[str], tuple[Run | None, str]],
    ):
        self.opened, self.point, self.state_of, self.records = opened, point, state_of, records
        self.run: StudyRun = opened.expanded.runs[point.run]
        self.config: RunConfig = self.run.config

    def as_json(self) -> dict[str, Any]:
        """As docs/scaling.md describes it."""
        point, opened = self.point, self.opened
        run, unreadable = self.records(point.run)
        measures = {} if point.items else self._held_out(run)
        try:
            measures |= measures_in(opened.measurements_of(point), point.items)
        except UserError as error:  # of this point alone
            unreadable = unreadable or str(error)
        state, why = self._state(unreadable)
        first = opened.expanded.runs[point.stage_one] if point.stage_one is not None else None
        data = self.config.data
        return {
            "point": point.name,
            "run": point.run,
            "step": point.step,
            "state": state,
            "error": why,
            "arm": point.arm,
            "size": point.size,
            "settings": dict(point.settings),
            "seed": point.seed,
            "budget": point.budget,
            "stage_one": point.stage_one,
            "trunk": point.trunk,
            "parameters": parameters_of(self.config),
            "tokens": point.step * self.config.training.global_batch_size * data.sequence_length,
            "compute": compute_of(self.config, point.step),
            "stage_one_compute": (
                (earlier_compute(self.config) or dict.fromkeys(COLUMNS, 0.0))
                if first is None
                else compute_of(first.config, first.config.training.steps)
            ),
            **self._time(run),
            "measures": measures,
            "curve": [*self._curve_of_trunk(), *_curve(run, point.step)],
            "samples": _samples(run, point.step),
        }

    def _state(self, unreadable: str) -> tuple[str, str | None]:
        """Of the point: its run, then what is measured of it; else the first run before it that is not done."""
        opened, point = self.opened, self.point
        for name in (point.stage_one, point.trunk, point.run):
            if name is None:
                continue
            state, said = self.state_of(name)
            if name == point.run and state != "finished" and (opened.checkpoint_of(point) / STATE).is_file():
                continue  # the run goes on, and was here
            if state != "finished":
                return state, f"{name}: {state}" + (f", {said}" if said else "")
        missing = opened.missing_measures(point)
        if missing:
            return "measured in part", f"not measured: {', '.join(missing)}"
        if unreadable:
            return "damaged", unreadable
        return "finished", None

    def _held_out(self, run: Run | None) -> dict[str, Measure]:
        """What training measured at this step, and the loss of its held-out likelihood under a name of its own."""
        if run is None:
            return {}
        records = [each for each in run.records if each["kind"] == "evaluation" and each["step"] == self.point.step]
        if not records:
            return {}
        measured = {name: value for name, value in records[-1].items() if isinstance(value, int | float)}
        skipped = {"step", "seconds"}
        return {
            "training_nats_per_token" if name == "nats_per_token" else name: {
                "value": value,
                "error": measured.get(f"{name}{_ERROR}"),
            }
            for name, value in measured.items()
            if name not in skipped and not name.endswith(_ERROR) and "_bin_" not in name
        }

    def _curve_of_trunk(self) -> list[list[Any]]:
        if self.point.trunk is None:
            return []
        return _curve(self.records(self.point.trunk)[0], self.run.begins_at)

    def _time(self, run: Run | None) -> dict[str, Any]:
        """Seconds of training to this step, its trunk's included, and what they are worth."""
        point, seconds = self.point, None
        if run is not None:
            seconds = run.cost(point.step).seconds
        if point.trunk is not None and seconds is not None:
            trunk, _ = self.records(point.trunk)
            before = None if trunk is None else trunk.cost(self.run.begins_at).seconds
            seconds = None if before is None else seconds + before
        attempts = read_attempts(self.opened.run_folder(point.run)) if run is not None else []
        last = attempts[-1] if attempts else {}
        devices, device = last.get("processes"), last.get("device")
        found = {"seconds": seconds, "devices": devices, "device": device, "device_hours": None, "mfu": None}
        if seconds and devices:
            found["device_hours"] = seconds * devices / 3600
            gpu = gpu_of_device(device) if device else None
            if gpu is not None:
                peak = gpu.bf16_flops if self.config.training.precision == "bf16" else gpu.fp32_flops
                found["mfu"] = compute_of(self.config, point.step)["model"] / (seconds * devices * peak)
        return found


def _curve(run: Run | None, step: int) -> list[list[Any]]:
    """[step, name, value] of what was measured during training."""
    if run is None:
        return []
    return [
        [record["step"], name, value]
        for record in run.records
        if record["kind"] == "evaluation" and record["step"] <= step
        for name, value in record.items()
        if name not in ("kind", "step", "seconds") and not name.endswith(_ERROR) and isinstance(value, int | float)
        if "_bin_" not in name
    ]


def _samples(run: Run | None, step: int) -> list[dict[str, str]]:
    """Held-out texts that the run continued at this step."""
    if run is None:
        return []
    found = [record for record in run.texts if record["step"] == step and record["kind"] == "continuations"]
    return [
        {"prompt": text["prompt"], "continuation": text["continuation"], "original": text["truth"]}
        for text in (found[-1]["texts"] if found else [])
    ]
