"""What Slurm has in its queue, and which of it belongs to a run or a folder.

A job belongs to the folder of its script, whoever submitted it and however; where the script says nothing, its id does,
which `cola submit` notes beside the script and the supervisor when it starts.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cola_megatron.errors import UserError
from launchers.slurm import commands
from launchers.slurm.submission import ELEMENTS, JOB, SUBMISSIONS

__all__ = ["Queue", "QueuedJob", "how_it_ended", "jobs_of", "read_queue", "refuse_second"]

NEVER_BEGUN = 0xFFFFFFFE
"""What Slurm shows as the element where all that were cancelled before they began share one record."""


@dataclass(frozen=True)
class QueuedJob:
    """A job that Slurm still has in its queue."""

    id: str
    """Of an element of an array ARRAY_INDEX."""
    number: str
    """Slurm's own, which is another for an element."""
    state: str
    """As Slurm writes it: RUNNING, PENDING, ..."""
    seconds_left: str
    """Of its time limit, as Slurm writes it."""
    reason: str
    """Why it waits, or its nodes."""
    script: Path

    @cached_property  # of hundreds of runs each looks for its jobs among hundreds
    def folder(self) -> Path:
        """The submission folder: that of the script, or of an element of an array its own."""
        folder = self.script.parent
        element = folder / ELEMENTS / self.id.rpartition("_")[2]
        return (element if "_" in self.id and element.exists() else folder).resolve()


@dataclass(frozen=True)
class Queue:
    """All jobs that wait or run, of everybody: a run may be trained by a colleague."""

    jobs: tuple[QueuedJob, ...] = ()

    def of_run(self, run_folder: Path) -> list[QueuedJob]:
        """The jobs that train this run."""
        submissions = (run_folder / SUBMISSIONS).resolve()
        noted = {job for _, job in jobs_of(run_folder)}
        return [job for job in self.jobs if job.folder.parent == submissions or noted & {job.id, job.number}]

    def below(self, folder: Path) -> list[QueuedJob]:
        """The jobs of what lies in a folder: runs, arrays, pipelines; of a data set, those that prepare it."""
        root = folder.resolve()
        roots = {root, root.with_name(f"{root.name}.work")}  # where `cola prep` works on a data set
        noted = set(_noted_below(folder))
        return [
            job
            for job in self.jobs
            if roots.intersection((*job.folder.parents, *job.script.parents)) or noted & {job.id, job.number}
        ]


def read_queue() -> Queue:
    """The queue as it is now; raises SlurmError where it cannot be known."""
    lines = commands.run(["squeue", "--noheader", "--array", "--format=%i|%A|%T|%L|%R|%o"]).splitlines()
    jobs = []
    for line in lines:
        name, number, state, left, reason, script = line.split("|", 5)
        jobs.append(QueuedJob(name, number, state, left, reason, Path(script)))
    return Queue(tuple(jobs))


def jobs_of(run_folder: Path) -> list[tuple[Path, str]]:
    """(submission folder, job id) of every submission that became a job, oldest first."""
    notes = sorted((run_folder / SUBMISSIONS).glob(f"*/{JOB}"))
    return [(note.parent, job) for note in notes for job in note.read_text().split()]


def how_it_ended(job: str) -> str:
    """COMPLETED, CANCELLED, TIMEOUT, ... of a job that left the queue; empty where Slurm has forgotten it."""
    shown = ["scontrol", "--oneliner", "show", "job"]
    asked = ["sacct", "--noheader", "--allocations", "--parsable2", "--format=State", f"--jobs={job}"]
    ways = [([*shown, job], r"\bJobState=(\w+)"), (asked, r"^(\w+)")]
    if "_" in job:
        ways.insert(1, ([*shown, job.partition("_")[0]], rf"\bArrayTaskId={NEVER_BEGUN} .*?\bJobState=(\w+)"))
    for command, state in ways:
        with contextlib.suppress(commands.SlurmError):
            found = re.search(state, commands.run(command))
            if found is not None:
                return found.group(1)
    return ""


def refuse_second(*folders: Path) -> None:
    """Raises UserError where jobs of a run, pipeline or preparation are in the queue already."""
    try:
        queue = read_queue()
    except commands.NoSlurm:
        return  # sbatch will say so
    for folder in folders:
        jobs = queue.below(folder)
        if jobs:
            names = ", ".join(job.id for job in jobs[:5]) + (", ..." if len(jobs) > 5 else "")
            raise UserError(
                f"{folder}: in the queue already as job {names}; wait for its end, or end it: `cola cancel {folder}`"
            )


def _noted_below(folder: Path) -> Iterator[str]:
    for depth in ("", "*/", "*/*/"):
        for note in sorted(folder.glob(f"{depth}{SUBMISSIONS}/*/{JOB}")):
            yield from note.read_text().split()
