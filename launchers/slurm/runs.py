"""What a run folder and the queue say together of a run."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cola_megatron.records.json_files import read_object
from cola_megatron.records.run_folder import CONFIG, MANIFEST, SUMMARY
from launchers.slurm import commands
from launchers.slurm.submission import JOB, SUBMISSIONS
from slurm.supervise import read_events

__all__ = ["QueuedJob", "RunState", "find_runs", "jobs_below", "jobs_of", "queue", "state_of"]

PROGRESS, EVENTS = "progress.json", "events.jsonl"


@dataclass(frozen=True)
class QueuedJob:
    """A job that Slurm still has in its queue."""

    id: str
    state: str
    """As Slurm writes it: RUNNING, PENDING, ..."""
    seconds_left: str
    """Of its time limit, as Slurm writes it."""
    reason: str
    """Why it waits, or its nodes."""


@dataclass(frozen=True)
class RunState:
    """One line of `cola status`."""

    run_folder: Path
    state: str
    """running, pending, finished, failed, cancelled, stopped, or local: it makes progress without a job."""
    job: str | None
    step: int | None
    steps: int | None
    loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    """Until the last step, at the present speed."""
    tries: int
    note: str
    """Why it waits or ended, and where to look."""


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """The run folders among these folders and two levels below: those that began, and those that wait for their job."""
    candidates = [path for folder in folders for below in ("", "*", "*/*") for path in _below(folder, below)]
    runs = [
        path for path in candidates if any(path.glob(f"{SUBMISSIONS}/*/config.yaml")) or (path / MANIFEST).is_file()
    ]
    # A prepared data set has a manifest too.
    return [path for path in dict.fromkeys(runs) if (path / CONFIG).is_file() or (path / SUBMISSIONS).is_dir()]


def jobs_below(folder: Path) -> list[str]:
    """Ids of all jobs that were ever submitted from a folder and two levels below: of runs, arrays and pipelines."""
    files = [path for depth in ("", "*/", "*/*/") for path in sorted(folder.glob(f"{depth}{SUBMISSIONS}/*/{JOB}"))]
    return [job for path in files for job in path.read_text().split()]


def jobs_of(run_folder: Path) -> list[tuple[Path, str]]:
    """(submission folder, job id) of every submission that became a job, oldest first."""
    folders = sorted(path for path in (run_folder / SUBMISSIONS).glob("*") if (path / JOB).is_file())
    return [(folder, (folder / JOB).read_text().strip()) for folder in folders]


def queue() -> dict[str, QueuedJob]:
    """Job id -> what is in the queue; elements of arrays as ARRAY_INDEX. Nothing where there is no Slurm."""
    try:
        lines = commands.run(["squeue", "--noheader", "--array", "--me", "--format=%i|%A|%T|%L|%R"]).splitlines()
    except commands.SlurmError:
        return {}
    jobs = {}
    for line in lines:
        name, number, state, left, reason = line.split("|", 4)
        jobs[name] = jobs[number] = QueuedJob(name, state, left, reason)
    return jobs


def state_of(run_folder: Path, queued: dict[str, QueuedJob]) -> RunState:
    """What a run does now, or how it ended; every file may be missing."""
    submissions = jobs_of(run_folder)
    folder, job = submissions[-1] if submissions else (None, None)
    live = next((queued[each] for _, each in reversed(submissions) if each in queued), None)
    progress, summary = _read(run_folder / PROGRESS), _read(run_folder / SUMMARY)
    events = read_events(str(folder / EVENTS)) if folder is not None else []
    step, steps = progress.get("step"), progress.get("steps")
    seconds = progress.get("seconds_per_step")
    state, note = _state_and_note(live, progress, summary, events, job)
    return RunState(
        run_folder=run_folder,
        state=state,
        job=live.id if live is not None else job,
        step=step if step is not None else summary.get("step"),
        steps=steps,
        loss=progress.get("loss"),
        tokens_per_second=progress.get("tokens_per_second"),
        seconds_left=(steps - step) * seconds if _trains(state, progress) and seconds and steps else None,
        tries=sum(event["event"] == "try" for event in events),
        note=note,
    )


def _trains(state: str, progress: dict) -> bool:
    """Whether steps are being made; a run without a job that was heard of a minute ago at most."""
    return state == "running" or (state == "local" and time.time() - progress["time"] < 60)


def _state_and_note(
    live: QueuedJob | None, progress: dict, summary: dict, events: list[dict], job: str | None
) -> tuple[str, str]:
    if live is not None:
        return (
            live.state.lower(),
            live.reason if live.state == "PENDING" else f"on {live.reason}, {live.seconds_left} left",
        )
    if summary.get("finished"):
        return "finished", ""
    last = events[-1] if events else None
    if last is not None and last["event"] == "stop":
        return "failed", f"exit code {last['code']}: {last['reason']}"
    if last is not None and last["event"] == "end" and last["code"] == 0:
        return "stopped", "before its planned end (training.stop_after)"
    if job is not None:
        return "ended", f"job {job} left the queue" + ("" if last is not None else " before its first try")
    if not progress:
        return "unknown", "no job, and no progress yet"
    return (
        "local",
        f"{progress['state']} {time.time() - progress['time']:.0f} s ago on {progress['host']}, without a job",
    )


def _is_run(folder: Path) -> bool:
    # A prepared data set has a manifest too, and a submission a config.
    began = (folder / MANIFEST).is_file() and (folder / CONFIG).is_file()
    return began or any(folder.glob(f"{SUBMISSIONS}/*/config.yaml"))


def _below(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern)) if pattern else [folder]


def _read(path: Path) -> dict[str, Any]:
    """A JSON file that a job writes, whole or not at all; nothing where it is missing or damaged."""
    return read_object(path)
