"""Ends a job that makes no progress, and writes where every rank stands.

A rank that hangs still beats (see `peer_watch`): its process lives, and the others wait for it in a collective. So a
thread watches the time since the last sign of progress. The rank that loses patience first tells the others through
the peer watch, and every rank writes the stacks of its threads before it ends.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Protocol

from cola_megatron.errors import ExitCode

STACKS = "stacks"


class Peers(Protocol):
    """The other ranks of the job; `step` is the step in hand."""

    step: int

    def report(self, text: str, code: ExitCode) -> None:
        """Tells them why this rank ends the job."""


class HangWatch:
    """Ends the job where `progress` was not called for `seconds` while the block runs; None: never."""

    def __init__(self, run_folder: Path, seconds: float | None, rank: int, world_size: int):
        self.folder, self.seconds, self.rank, self.world_size = run_folder / STACKS, seconds, rank, world_size
        self.peers: Peers | None = None
        self._last, self._out = time.monotonic(), threading.Event()

    def __enter__(self) -> "HangWatch":
        # `kill -USR2` shows where a slow job is, and the job goes on.
        faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
        self.progress()
        if self.seconds is not None:
            threading.Thread(target=self._watch, args=(self.seconds,), name="hang watch", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._out.set()

    def progress(self) -> None:
        """Something was finished: a step, a batch of a measurement, a phase of the start or of a save."""
        self._last = time.monotonic()

    def write_stacks(self) -> Path:
        """Writes the stacks of all threads of this process into the folder of the step in hand, and returns that."""
        step = self.peers.step if self.peers is not None else 0
        folder = self.folder / f"step_{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"rank_{self.rank:05d}.txt").open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC, process {os.getpid()}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        return folder

    def _watch(self, seconds: float) -> None:
        pause = min(1.0, seconds / 10)
        while not self._out.wait(pause):
            silent = time.monotonic() - self._last
            if silent > seconds:
                self._end(silent)
                return

    def _end(self, silent: float) -> None:
        step = self.peers.step if self.peers is not None else 0
        where = f"in step {step}" if step else "before the first step"
        folder = self.write_stacks()
        text = f"rank {self.rank} made no progress for {silent:.0f} s, {where}; the stacks of all ranks are in {folder}"
        if self.peers is not None and self.world_size > 1:
            self.peers.report(text, ExitCode.HUNG)
            # The peer watch ends this process, too, when the others know; this is for the case that it cannot.
            self._out.wait(30)
        print(f"cola: {text} (training.hang_seconds={self.seconds:g})", file=sys.stderr, flush=True)
        os._exit(ExitCode.HUNG)
