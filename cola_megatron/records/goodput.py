"""How often a run was started and what that cost: attempts.jsonl, a line for every start.

Goodput is the share of the time for which the jobs of a run held their machines that went into steps, measurements and
saves that count: what is left are starts, steps that were lost, and waiting for a failure to be noticed.
"""

import itertools
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import psutil

from cola_megatron.records.json_files import as_lines, read_lines, repair_lines
from cola_megatron.records.progress import read_progress

ATTEMPTS = "attempts.jsonl"


class Goodput(TypedDict, total=False):
    """Of the main process; elsewhere nothing is known of it."""

    restarts: int
    lost_steps: int
    goodput: float


@dataclass(frozen=True)
class Accounts:
    """What the starts of a run before this one came to."""

    restarts: int
    """Starts before this one."""
    lost_steps: int
    """Steps that were taken more than once, over all starts."""
    held_before: float
    """Seconds for which the earlier starts held their machines, until their last sign of life."""
    began: float

    def metrics(self, seconds: float) -> Goodput:
        """For a record of metrics.jsonl; `seconds` is the time in what counts, over all starts."""
        held = self.held_before + max(time.time() - self.began, 1e-9)
        goodput = min(1.0, seconds / held)
        return {"restarts": self.restarts, "lost_steps": self.lost_steps, "goodput": goodput}


def begin_attempt(run_folder: Path, from_step: int, world_size: int, device: str = "cpu") -> Accounts:
    """Notes a start in attempts.jsonl, before progress.json is written anew; the main process calls it."""
    earlier = repair_lines(run_folder / ATTEMPTS, _is_attempt)
    progress = read_progress(run_folder)
    alive_until = progress.get("time")
    # The supervisor of a job knows when the try began; in one process a run may start twice.
    began = float(os.environ.get("COLA_ATTEMPT_BEGAN", psutil.Process().create_time()))
    entry = {
        "began": max(began, alive_until or 0.0),
        "from_step": from_step,
        "lost_steps": max(0, progress.get("step", 0) - from_step) if earlier else 0,
        "previous_alive_until": alive_until,
        "job": os.environ.get("SLURM_JOB_ID"),
        "requeues": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        "nodes": os.environ.get("SLURM_JOB_NODELIST", socket.gethostname()),
        "processes": world_size,
        "device": device,
    }
    with (run_folder / ATTEMPTS).open("a") as file:
        file.write(as_lines([entry]))
        file.flush()
        os.fsync(file.fileno())
    return accounts_of([*earlier, entry])


def accounts_of(attempts: list[dict[str, Any]]) -> Accounts:
    """The accounts at the last of these attempts."""
    held = 0.0
    for attempt, following in itertools.pairwise(attempts):
        held += max(0.0, (following["previous_alive_until"] or attempt["began"]) - attempt["began"])
    lost = sum(attempt["lost_steps"] for attempt in attempts)
    return Accounts(len(attempts) - 1, lost, held, attempts[-1]["began"])


def read_attempts(run_folder: Path) -> list[dict[str, Any]]:
    """The starts of a run, oldest first; lines that cannot be read are left out."""
    path = run_folder / ATTEMPTS
    return read_lines(path, _is_attempt)[0] if path.is_file() else []


def _is_attempt(record: dict[str, Any]) -> bool:
    return {"began", "from_step", "lost_steps", "previous_alive_until"} <= record.keys()
