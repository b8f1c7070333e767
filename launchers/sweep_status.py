"""What has become of a study's runs and points, for people: from the folders, and from Slurm where it trains them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cola_megatron.records.progress import read_progress
from cola_megatron.studies.folder import LOG, StudyFolder, last_line
from cola_megatron.studies.measured import wanted
from cola_megatron.studies.runs import DATA, Point, StudyRun
from launchers.slurm.commands import SlurmError
from launchers.slurm.queue import Queue, QueuedJob, jobs_of, read_queue
from launchers.slurm.runs import RunState
from launchers.slurm.runs import state_of as slurm_state_of
from launchers.slurm.submission import JOB, SUBMISSIONS
from launchers.sweep_jobs import preparation
from launchers.sweep_slurm import POINTS

AFTERMATH = re.compile(
    r"srun: |slurmstepd: |cola: (the job ends |try \d+ ended |rank \d+ ended with exit code (1|2|74)$)"
)
"""Lines of a job's log after that which says why a run ended."""


@dataclass(frozen=True)
class StudyStates:
    """How the runs of a study stand, whoever trains them."""

    opened: StudyFolder

    def of_run(self, name: str) -> tuple[str, str]:
        """(state, last error or why it waits) of a run."""
        opened, folder = self.opened, self.opened.run_folder(name)
        state = opened.state_of(name)
        if state in ("finished", "running") or not _is_slurms(folder):
            return state, opened.error_of(name) if state == "failed" else ""
        found = slurm_state_of(folder, self.queue)
        return found.state, _last_error(folder, found) or found.note

    def of_point(self, point: Point) -> tuple[str, str]:
        """(state, last line of its log) of the measurements of a point."""
        asked, missing = len(wanted(self.opened.study.measures)), len(self.opened.missing_measures(point))
        if not missing:
            return "finished", ""
        job = self._measures(point.name)
        if job is not None:
            return job.state.lower(), job.reason if job.state == "PENDING" else ""
        state = "not begun" if missing == asked else "in part"
        return state, last_line(self.opened.measurements_of(point) / LOG)

    @cached_property
    def queue(self) -> Queue | None:
        """None: Slurm does not answer."""
        with contextlib.suppress(SlurmError):
            return read_queue()
        return None

    @property
    def data_job(self) -> QueuedJob | None:
        """The job in the queue that prepares the data."""
        found = [] if self.queue is None else self.queue.below(self.opened.folder)
        return next((job for job in found if job.script.name == f"{DATA}.sbatch"), None)

    def _measures(self, name: str) -> QueuedJob | None:
        """The job in the queue that measures this point."""
        if not self._elements.get(name) or self.queue is None:
            return None
        return next((job for job in self.queue.jobs if job.id in self._elements[name]), None)

    @cached_property
    def _elements(self) -> dict[str, set[str]]:
        """Ids of the elements of arrays that were to measure a point, by its name."""
        found: dict[str, set[str]] = {}
        for points in sorted((self.opened.folder / SUBMISSIONS).glob(f"*/{POINTS}")):
            note = points.with_name(JOB)
            jobs = note.read_text().split() if note.is_file() else []
            for number, name in enumerate(points.read_text(encoding="utf-8").splitlines()):
                found.setdefault(name, set()).update(f"{job}_{number}" for job in jobs)
        return found


def status_rows(opened: StudyFolder) -> list[dict[str, Any]]:
    """Of each run its state, step and last error; of each point what was measured; before them data that miss yet."""
    states = StudyStates(opened)
    runs = [_of_run(opened, states, run) for run in opened.expanded.runs.values()]
    return [*_of_data(opened, states), *runs, *_of_points(opened, states)]


def _of_data(opened: StudyFolder, states: StudyStates) -> Iterator[dict[str, Any]]:
    """Nothing where the data are there, or the study does not prepare them itself."""
    if opened.study.data.source is None or preparation(opened).is_done():
        return
    logs = [*opened.folder.glob(f"{DATA}.log"), *opened.folder.glob(f"{SUBMISSIONS}/*/{DATA}-*.log")]
    newest = max(logs, key=lambda path: path.stat().st_mtime, default=None)
    note = f"{last_line(newest)}; see {newest}" if newest is not None else ""
    state, job = "not begun" if newest is None else "in part", states.data_job
    if job is not None:
        state, note = job.state.lower(), job.reason if job.state == "PENDING" else note
    yield {"name": DATA, "role": DATA, "state": state, "progress": "", "note": note}


def _of_run(opened: StudyFolder, states: StudyStates, run: StudyRun) -> dict[str, Any]:
    state, note = states.of_run(run.name)
    step, steps = read_progress(opened.run_folder(run.name)).get("step", 0), run.config.training.steps
    return {"name": run.name, "role": run.role, "state": state, "progress": f"{step:,}/{steps:,}", "note": note}


def _of_points(opened: StudyFolder, states: StudyStates) -> Iterator[dict[str, Any]]:
    asked = len(wanted(opened.study.measures))
    for point in opened.expanded.points:
        state, note = states.of_point(point)
        progress = f"{asked - len(opened.missing_measures(point))}/{asked}"
        yield {"name": point.name, "role": "measured", "state": state, "progress": progress, "note": note}


def _is_slurms(run_folder: Path) -> bool:
    """Whether a run was begun last by a job of Slurm, not by `cola sweep run` or `resume`."""
    noted = [(folder / JOB).stat().st_mtime for folder, _ in jobs_of(run_folder)]
    log = run_folder / LOG
    return bool(noted) and (not log.is_file() or max(noted) > log.stat().st_mtime)


def _last_error(run_folder: Path, found: RunState) -> str:
    """What a run that failed said last in the log of its job, and where that is; empty for others."""
    if found.state != "failed" or found.job is None:
        return ""
    # That of an array's element lies in the folder of the array.
    places = (run_folder, run_folder.parent)
    logs = [path for place in places for path in place.glob(f"{SUBMISSIONS}/*/slurm-{found.job}.log")]
    said = last_line(logs[0], AFTERMATH) if logs else ""
    return f"{said}; see {logs[0]}" if said else ""
