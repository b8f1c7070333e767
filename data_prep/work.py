"""The work folder of a preparation: which tasks are finished, and what they left.

    NAME.work/plan.json             what is prepared, and from which parts
    NAME.work/STEP/00007/           everything task 7 of a step made, report.json among it
    NAME.work/.lock                 held by processes at work, against the removal of what they work on

A task's folder appears when the task is finished, whole. Nothing else says so, and nothing in it changes afterwards:
a kill at any moment costs the tasks that were running, and any process on any machine that sees the folder can go on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from data_prep.errors import DataPrepError
from data_prep.folders import new_folder, remove_folder

__all__ = ["PLAN_NAME", "REPORT_NAME", "WorkFolder", "write_report"]

PLAN_NAME = "plan.json"
REPORT_NAME = "report.json"
REPLACE_NAME = "replace"
LOCK_NAME = ".lock"

Report = dict[str, Any]


def write_report(folder: Path, report: Report) -> None:
    """Writes what a task says of its work, the same bytes for the same report."""
    (folder / REPORT_NAME).write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _lock(file: IO[str], kind: int) -> bool:
    """Whether the lock could be had; it goes with the process. A file system without locks has all of them."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise
    return True


class WorkFolder:
    """Finished tasks below one folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def folder(self, step: str, task: int) -> Path:
        """Where the files of a task are, once it is finished."""
        return self.path / step / f"{task:05d}"

    def is_finished(self, step: str, task: int) -> bool:
        """Whether the task's folder is there."""
        return self.folder(step, task).is_dir()

    def report(self, step: str, task: int) -> Report:
        """What the finished task said of its work.

        Raises:
            DataPrepError: the task is not finished, or its report is damaged.
        """
        path = self.folder(step, task) / REPORT_NAME
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise DataPrepError(f"{path}: task {task} of step {step} is not finished; run it first") from error
        except (OSError, ValueError) as error:
            raise DataPrepError(f"{path}: cannot be read ({error}); remove {path.parent} and run again") from error

    def reports(self, step: str, tasks: int) -> Iterator[Report]:
        """The reports of all tasks of a step, in order; raises DataPrepError as `report`."""
        return (self.report(step, task) for task in range(tasks))

    def run(self, step: str, task: int, work: Callable[[Path], Report]) -> None:
        """Calls `work` with a folder to fill, unless the task is finished, and keeps the folder and its report.

        Raises:
            DataPrepError: what `work` raises, or the folder cannot be written (full disk). The task stays unfinished.
        """
        if self.is_finished(step, task):
            return
        try:
            with new_folder(self.folder(step, task)) as folder:
                write_report(folder, work(folder))
        except DataPrepError:
            # Another process ran the same task and was faster: the two results are equal.
            if not self.is_finished(step, task):
                raise

    @property
    def may_replace(self) -> bool:
        """Whether the finished folder may take the place of another one: asked for when the work began."""
        return (self.path / REPLACE_NAME).exists()

    def allow_replacing(self) -> None:
        """Makes `may_replace` true."""
        (self.path / REPLACE_NAME).touch()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keeps others from removing the folder; any number of processes may work in it at once."""
        with self._lock_file() as file:
            _lock(file, fcntl.LOCK_SH)
            yield

    def refuse_if_in_use(self) -> None:
        """Raises DataPrepError where another process is at work in the folder."""
        with self._lock_file() as file:
            if not _lock(file, fcntl.LOCK_EX):
                raise DataPrepError(
                    f"{self.path}: another process is at work there; wait for it or stop it, or choose another --output"
                )

    def _lock_file(self) -> IO[str]:
        try:
            return (self.path / LOCK_NAME).open("a")
        except OSError as error:
            raise DataPrepError(
                f"{self.path}: cannot be written ({error.strerror}); free space or check its rights"
            ) from error

    def has_finished_tasks(self) -> bool:
        """Whether any task of any step is finished."""
        return any(path.parent.is_dir() for path in self.path.glob(f"*/*/{REPORT_NAME}"))

    def forget(self, step: str, task: int) -> None:
        """Makes a finished task unfinished."""
        remove_folder(self.folder(step, task))

    def write_plan(self, text: str) -> None:
        """Puts the plan in place at once, the folder too; raises DataPrepError where the folder cannot be written."""
        temporary = self.path / f".{PLAN_NAME}.{os.getpid()}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text + "\n", encoding="utf-8")
            temporary.rename(self.path / PLAN_NAME)
        except OSError as error:
            raise DataPrepError(
                f"{self.path}: cannot be written ({error.strerror}); free space or check its rights"
            ) from error

    def remove(self) -> None:
        """Removes everything, unfinished tasks of killed processes included."""
        remove_folder(self.path)
