"""What has become of a study's runs and points, for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cola_megatron.records.progress import read_progress
from cola_megatron.scaling.measured import wanted
from cola_megatron.scaling.study_folder import StudyFolder
from cola_megatron.scaling.study_runs import StudyRun


def status_rows(opened: StudyFolder) -> list[dict[str, Any]]:
    """Of each run its state, step and last error; of each point what was measured."""
    return [*(_of_run(opened, run) for run in opened.expanded.runs.values()), *_of_points(opened)]


def _of_run(opened: StudyFolder, run: StudyRun) -> dict[str, Any]:
    state = opened.state_of(run.name)
    step, steps = read_progress(opened.run_folder(run.name)).get("step", 0), run.config.training.steps
    note = opened.error_of(run.name) if state == "failed" else ""
    return {"name": run.name, "role": run.role, "state": state, "progress": f"{step:,}/{steps:,}", "note": note}


def _of_points(opened: StudyFolder) -> Iterator[dict[str, Any]]:
    asked = len(wanted(opened.study.measures))
    for point in opened.expanded.points:
        found = asked - len(opened.missing_measures(point))
        state = "finished" if found == asked else "in part" if found else "not begun"
        yield {"name": point.name, "role": "measured", "state": state, "progress": f"{found}/{asked}", "note": ""}
