"""Where a run stands, for people who watch it: progress.json, written anew at most once a second."""

import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cola_megatron.records.json_files import read_object, to_json, write_whole

PROGRESS = "progress.json"
EVERY_SECONDS = 1.0


@dataclass
class Progress:
    """Where a run stands."""

    step: int
    steps: int
    """Planned."""
    state: str
    """starting, training, measuring, saving, finished, stopped, diverged or failed."""
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds_per_step: float | None = None
    """Average over the last steps."""
    job: str | None = None
    """Of Slurm."""
    host: str = ""
    time: float = 0.0
    """When this was written, in seconds since 1970."""


class ProgressFile:
    """Keeps progress.json of a run folder current; a reader finds it whole at any time."""

    def __init__(self, run_folder: Path, step: int, steps: int):
        self._path = run_folder / PROGRESS
        self._last = 0.0
        self._stepped: float | None = None
        job, host = os.environ.get("SLURM_JOB_ID"), socket.gethostname()
        self.progress = Progress(step, steps, "starting", job=job, host=host)
        self.write("starting")

    def stepped(self, step: int, loss: float, tokens: int) -> None:
        """Notes a finished step of so many tokens."""
        now, progress = time.monotonic(), self.progress
        if self._stepped is not None:
            took = now - self._stepped
            mean = progress.seconds_per_step
            progress.seconds_per_step = took if mean is None else mean + 0.1 * (took - mean)
            progress.tokens_per_second = tokens / progress.seconds_per_step
        self._stepped, progress.step, progress.loss = now, step, loss
        if now - self._last >= EVERY_SECONDS:
            self.write("training")

    def write(self, state: str) -> None:
        """Writes at once, in this state."""
        self.progress.state, self.progress.time, self._last = state, time.time(), time.monotonic()
        if state in ("measuring", "saving"):
            self._stepped = None  # the next step's time would include it
        write_whole(self._path, to_json(asdict(self.progress)) + "\n", durable=False)


def read_progress(run_folder: Path) -> dict[str, Any]:
    """What progress.json says, nothing where there is none or it is damaged."""
    return read_object(run_folder / PROGRESS)
