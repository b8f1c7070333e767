"""A study on this machine: its jobs as processes, several at a time, each begun when what it needs has ended well."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from cola_megatron.errors import RETRIED, UserError
from cola_megatron.studies.folder import is_locked, last_line
from launchers.sweep_jobs import Job

POLL_SECONDS = 0.2
STOP_SECONDS = 120
"""How long processes that were asked to end may take to save."""
TRIES = 3
"""Of a job that ends in a way that another try may cure."""
_PARENT_DIED = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


@dataclass(frozen=True)
class Machine:
    """What of this machine a study may use."""

    at_once: int
    """Jobs at a time."""
    memory: float
    """Bytes for all of them."""
    gpus: tuple[str, ...] = ()
    """CUDA_VISIBLE_DEVICES of each job at a time, which jobs beyond their number share; none: the CPU."""
    processes: int = 1
    """Of each run: its share of the cores is divided among them."""


@dataclass(frozen=True)
class Outcome:
    """How a study went."""

    done: list[str]
    failed: dict[str, str]
    """The last line that each printed."""
    waiting: list[str]
    """What could not begin: something before it failed, or the end was asked for."""
    stopped: bool


@dataclass
class _Running:
    job: Job
    words: list[list[str]]
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    slot: int
    began: float


class LocalScheduler:
    """Runs the jobs of a study; each call of `run` goes on with what is not done."""

    def __init__(self, jobs: Mapping[str, Job], machine: Machine):
        self.jobs, self.machine = jobs, machine
        self.running: dict[str, _Running] = {}
        self.failed: dict[str, str] = {}
        self.tries: dict[str, int] = {}
        self.done = {name for name, job in jobs.items() if job.is_done()}
        self.asked_to_stop = False
        self._said_waiting: set[str] = set()

    def run(self) -> Outcome:
        """Until all is done, nothing more can begin, or a signal asks for the end.

        Raises:
            UserError: one job alone needs more memory than there is.
        """
        left = [job for name, job in self.jobs.items() if name not in self.done]
        for job in left:
            if job.memory > self.machine.memory:
                needed, free = job.memory / 2**30, self.machine.memory / 2**30
                raise UserError(
                    f"{job.name} needs about {needed:.1f} GiB, and {free:.1f} GiB may be used: give a smaller "
                    "micro_batch_size, or --memory"
                )
        _say(f"{len(self.jobs)} jobs, {len(self.done)} done before; {self.machine.at_once} at a time")
        with self._stopping_on_signals():
            try:
                while not self.asked_to_stop:
                    self._reap()
                    goes_on = not self.asked_to_stop and self._begin_what_can()
                    if not (goes_on or self.running or self._waits_for_others()):
                        break
                    time.sleep(POLL_SECONDS)
            finally:
                self._end_all()
        waiting = [name for name in self.jobs if name not in self.done and name not in self.failed]
        return Outcome(sorted(self.done), self.failed, waiting, self.asked_to_stop)

    def _begin_what_can(self) -> bool:
        """Returns whether something was found done, by somebody else meanwhile, so that more may be ready."""
        found = False
        for job in sorted(self._ready(), key=lambda job: (job.kind != "measure", -job.flops)):
            used = sum(each.job.memory for each in self.running.values())
            if len(self.running) >= self.machine.at_once or used + job.memory > self.machine.memory:
                break
            if job.run_folder is not None and is_locked(job.run_folder):
                if job.name not in self._said_waiting:
                    _say(f"{job.name}: another job trains there; it is waited for")
                    self._said_waiting.add(job.name)
            elif job.is_done():
                self.done.add(job.name)
                found = True
            else:
                try:
                    self._begin(job, [list(words) for words in job.words()])
                except OSError as error:  # such as a full disk
                    self._has_failed(job.name, f"could not begin: {error}")
        return found

    def _ready(self) -> list[Job]:
        return [
            job
            for name, job in self.jobs.items()
            if name not in self.done and name not in self.failed and name not in self.running
            if all(need in self.done for need in job.needs)
        ]

    def _waits_for_others(self) -> bool:
        return any(job.run_folder is not None and is_locked(job.run_folder) for job in self._ready())

    def _begin(self, job: Job, words: list[list[str]], slot: int | None = None) -> None:
        if slot is None:
            slot = min(set(range(self.machine.at_once)) - {each.slot for each in self.running.values()})
        job.log.parent.mkdir(parents=True, exist_ok=True)
        log = job.log.open("ab")
        process = subprocess.Popen(
            [sys.executable, "-m", "cola_megatron", *words[0]],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=self._environment(slot),
            preexec_fn=_end_with(os.getpid()),
        )
        self.running[job.name] = _Running(job, words[1:], process, log, slot, time.monotonic())

    def _environment(self, slot: int) -> dict[str, str]:
        cores, processes = len(os.sched_getaffinity(0)), self.machine.at_once * self.machine.processes
        environment = {"OMP_NUM_THREADS": str(max(1, cores // processes)), **os.environ}
        if self.machine.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.machine.gpus[slot % len(self.machine.gpus)]
        return environment

    def _reap(self) -> None:
        for name, each in list(self.running.items()):
            code = each.process.poll()
            if code is None:
                continue
            del self.running[name]
            each.log.close()
            if code == 0 and each.words:
                self._begin(each.job, each.words, each.slot)
            else:
                self._ended(each, code)

    def _ended(self, each: _Running, code: int) -> None:
        name, took = each.job.name, time.monotonic() - each.began
        if code == 0 and each.job.is_done():
            self.done.add(name)
            _say(f"{name}: done in {took:.0f} s ({len(self.done)} of {len(self.jobs)})")
            return
        self.tries[name] = self.tries.get(name, 0) + 1
        again = code < 0 or code in RETRIED
        if again and self.tries[name] < TRIES:
            _say(f"{name}: ended with code {code}, and is begun again")
            return
        self._has_failed(name, last_line(each.job.log) or f"ended with code {code}")

    def _has_failed(self, name: str, said: str) -> None:
        self.failed[name] = said
        _say(f"{name}: failed: {said}")

    @contextmanager
    def _stopping_on_signals(self) -> Iterator[None]:
        before = {
            number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: object) -> None:
        self.asked_to_stop = True

    def _end_all(self) -> None:
        if not self.running:
            return
        _say(f"asked to end: {', '.join(self.running)} save and end")
        for each in self.running.values():
            each.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + STOP_SECONDS
        for name, each in self.running.items():
            try:
                each.process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                _say(f"{name}: did not end within {STOP_SECONDS} s, and is killed")
                each.process.kill()
                each.process.wait()
            each.log.close()
        self.running.clear()


def _end_with(parent: int):
    """Called in a new process: SIGTERM where the process that began it dies, so that no run outlives its study."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None

    def prepare() -> None:
        if library is not None:
            library.prctl(_PARENT_DIED, signal.SIGTERM)
            if os.getppid() != parent:  # it died before that
                os.kill(os.getpid(), signal.SIGTERM)

    return prepare


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
