"""Running the steps of a preparation with processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import sys
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from threading import Thread

from tqdm import tqdm

from data_prep.errors import DataPrepError
from data_prep.plan import Plan, open_plan
from data_prep.steps import Step, run_task, steps_of
from data_prep.work import WorkFolder

__all__ = ["run_step", "run_steps", "start_workers", "usable_cores"]

POLL_SECONDS = 0.2


def usable_cores() -> int:
    """Cores that this process may use (a Slurm job or a container may have fewer than the machine)."""
    return len(os.sched_getaffinity(0))


def start_workers() -> multiprocessing.context.ForkServerContext:
    """The context of the worker processes: forked from a process that has imported everything, and nothing else.

    Not from this one, which may hold threads of libraries, and their locks. It starts at the first call, and by itself.
    """
    context = multiprocessing.get_context("forkserver")
    # In a wheel, importing the command makes this package importable there.
    context.set_forkserver_preload(["cola_megatron.command", "data_prep.steps"])
    forkserver.ensure_running()
    return context


def run_steps(plan: Plan, work: WorkFolder, workers: int, progress: bool) -> None:
    """Runs what is not finished of every step, one step after another.

    Args:
        workers: processes that run tasks; with 1 the tasks run in this process.
        progress: show a bar for each step on stderr.

    Raises:
        DataPrepError: of the first task that failed; the tasks that were running are waited for, and what is finished
            stays.
    """
    if workers > 1 and len(plan.inputs) > 1:
        start_workers()  # its imports take seconds: now, while this process is at the first step
    for step in steps_of(plan):
        run_step(plan, work, step, workers, progress)


def run_step(plan: Plan, work: WorkFolder, step: Step, workers: int, progress: bool) -> None:
    """One step of `run_steps`, whose predecessors are finished."""
    tasks = [task for task in range(step.tasks) if not work.is_finished(step.name, task)]
    if not tasks:
        return
    total = sum(plan.inputs[task].bytes for task in tasks) if step.reads_inputs else len(tasks)
    with tqdm(
        total=total or None,  # embedded sources have no size
        desc=step.name,
        unit="B" if step.reads_inputs else "task",
        unit_scale=step.reads_inputs,
        disable=not progress,
        file=sys.stderr,
    ) as bar:
        if workers > 1 and len(tasks) > 1:
            _run_in_processes(work, step, tasks, min(workers, len(tasks)), bar)
            return

        def advance(count: int) -> None:
            bar.update(count)

        for task in tasks:
            run_task(plan, work, step, task, advance if step.reads_inputs else lambda count: None)
            bar.update(0 if step.reads_inputs else 1)


def _run_in_processes(work: WorkFolder, step: Step, tasks: list[int], workers: int, bar: tqdm) -> None:
    context = start_workers()
    read = context.Value("q", 0)
    with ProcessPoolExecutor(workers, context, _begin_worker, (work.path, read)) as pool:
        futures = [pool.submit(_run_in_worker, step.name, task) for task in tasks]
        pending: set[Future[None]] = set(futures)
        try:
            while pending:
                done, pending = wait(pending, timeout=POLL_SECONDS)
                bar.update(read.value - bar.n if step.reads_inputs else len(done))
                for future in done:
                    future.result()
        except BrokenProcessPool as error:
            raise DataPrepError(
                f"step {step.name}: a worker process was killed (out of memory?); finished tasks are kept: run again, "
                "with fewer --workers or a smaller task_bytes if it happens again"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class _Worker:
    """What a worker process opens once."""

    plan: Plan
    work: WorkFolder
    bytes_read: Synchronized[int]
    """Shared by all workers, for the progress bar."""

    def advance(self, count: int) -> None:
        with self.bytes_read.get_lock():
            self.bytes_read.value += count


_worker: _Worker


def _begin_worker(folder: Path, bytes_read: Synchronized[int]) -> None:
    global _worker
    Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    work = WorkFolder(folder)
    _worker = _Worker(open_plan(work), work, bytes_read)


def _end_with_parent() -> None:
    """Ends this worker when the process that gives it work is gone, however that ended; a half-done task is none."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has one"
    parent.join()
    os._exit(1)


def _run_in_worker(step_name: str, task: int) -> None:
    step = next(step for step in steps_of(_worker.plan) if step.name == step_name)
    run_task(_worker.plan, _worker.work, step, task, _worker.advance)
