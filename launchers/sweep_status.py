"""What has become of a study's runs and points, for people."""

from __future__ import annotations

from typing import Any

from cola_megatron.records.progress import read_progress
from cola_megatron.scaling.measured import wanted
from cola_megatron.scaling.study_folder import StudyFolder


def status_rows(opened: StudyFolder) -> list[dict[str, Any]]:
    """Of each run its state, step and last error; of each point what was measured."""
    rows = []
    for run in opened.expanded.runs.values():
        state, folder = opened.state_of(run.name), opened.run_folder(run.name)
        progress = read_progress(folder)
        step, steps = progress.get("step", 0), run.config.training.steps
        note = opened.error_of(run.name) if state == "failed" else ""
        rows.append(
            {"name": run.name, "role": run.role, "state": state, "progress": f"{step:,}/{steps:,}", "note": note}
        )
    for point in opened.expanded.points:
        missing = opened.missing_measures(point)
        count = len(wanted(opened.study.measures))
        state = "finished" if not missing else "not begun" if len(missing) == count else "in part"
        progress = f"{count - len(missing)}/{count}"
        rows.append({"name": point.name, "role": "measured", "state": state, "progress": progress, "note": ""})
    return rows
