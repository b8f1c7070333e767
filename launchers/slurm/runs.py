"""What a run folder and the queue say together of a run."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cola_megatron.records.json_files import read_object
from cola_megatron.records.run_folder import CONFIG, MANIFEST, SUMMARY
from launchers.slurm.queue import Queue, QueuedJob, how_it_ended, jobs_of
from launchers.slurm.submission import SUBMISSIONS
from slurm.supervise import read_events

__all__ = ["RunState", "find_runs", "has_finished", "state_of"]

PROGRESS, EVENTS = "progress.json", "events.jsonl"


@dataclass(frozen=True)
class RunState:
    """One line of `cola status`."""

    run_folder: Path
    state: str
    """running, pending, finished, failed, stopped; cancelled, timeout, ... as Slurm calls the end of its job, or ended
    where Slurm has forgotten it; unknown: the queue does not answer; local: it makes progress without a job."""
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


def has_finished(run_folder: Path) -> bool:
    """Whether a run reached its last step."""
    return bool(_read(run_folder / SUMMARY).get("finished"))


def state_of(run_folder: Path, queue: Queue | None) -> RunState:
    """What a run does now, or how it ended; every file may be missing.

    Args:
        queue: None where it does not answer.
    """
    submissions = jobs_of(run_folder)
    folder, job = submissions[-1] if submissions else (None, None)
    live = next(reversed(queue.of_run(run_folder)), None) if queue is not None else None
    progress, summary = _read(run_folder / PROGRESS), _read(run_folder / SUMMARY)
    events = read_events(str(folder / EVENTS)) if folder is not None else []
    events = [event for event in events if event.get("job") == job] or events
    step, steps = progress.get("step"), progress.get("steps")
    seconds = progress.get("seconds_per_step")
    state, note = _state_and_note(live, progress, summary, events, job, known=queue is not None)
    if live is None and job is not None and state not in ("finished", "unknown"):
        # That of an array's element lies in the folder of the array.
        logs = [
            path for place in (run_folder, run_folder.parent) for path in place.glob(f"{SUBMISSIONS}/*/slurm-{job}.log")
        ]
        note += f"; see {logs[0]}" if logs else ""
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
    live: QueuedJob | None, progress: dict, summary: dict, events: list[dict], job: str | None, *, known: bool
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
    if job is not None and not known:
        return "unknown", f"the queue does not say whether job {job} waits or runs"
    if job is not None:
        what = "left the queue" if last is not None else "never began to train"
        return how_it_ended(job).lower() or "ended", f"job {job} {what}"
    if not progress:
        return "unknown", "no job, and no progress yet"
    return (
        "local",
        f"{progress['state']} {time.time() - progress['time']:.0f} s ago on {progress['host']}, without a job",
    )


def _below(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern)) if pattern else [folder]


def _read(path: Path) -> dict[str, Any]:
    """A JSON file that a job writes, whole or not at all; nothing where it is missing or damaged."""
    return read_object(path)
