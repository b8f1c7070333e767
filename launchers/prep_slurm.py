"""`cola prep submit`: the steps of a preparation as Slurm job arrays, each after the one before."""

from dataclasses import dataclass

from data_prep.plan import Plan
from data_prep.steps import steps_of
from data_prep.work import WorkFolder
from launchers.slurm import commands
from launchers.slurm.render import container_command, render
from launchers.slurm.site import Site
from launchers.slurm.submission import JOB, write

TEMPLATE = "prep.sbatch.j2"


@dataclass(frozen=True)
class ArraySettings:
    """How the arrays run."""

    site: Site
    """Of which the keys about GPUs and nodes are not used."""
    elements: int
    """Largest size of an array (Slurm's default MaxArraySize allows 1000); an element does every so-many-th task."""
    concurrency: int | None
    """Elements that run at once."""


def scripts(plan: Plan, work: WorkFolder, settings: ArraySettings) -> dict[str, str]:
    """The batch script of every step that has unfinished tasks, in order."""
    rendered = {}
    for step in steps_of(plan):
        if all(work.is_finished(step.name, task) for task in range(step.tasks)):
            continue
        elements = min(step.tasks, settings.elements)
        rendered[step.name] = render(
            TEMPLATE,
            site=settings.site,
            step=step.name,
            tasks=step.tasks,
            elements=elements,
            work=work.path,
            resources=[f"--array=0-{elements - 1}" + (f"%{settings.concurrency}" if settings.concurrency else "")],
            command=container_command(settings.site, ["prep", "task", str(work.path), step.name]),
        )
    return rendered


def submit(work: WorkFolder, rendered: dict[str, str]) -> dict[str, str]:
    """Writes the scripts into the work folder and submits them; returns the job id of each step.

    Raises:
        SlurmError: there is no Slurm here, or it refuses a job; jobs that were already accepted are cancelled.
    """
    folder = work.path / "scripts"
    for name in (folder, work.path / "logs"):
        name.mkdir(exist_ok=True)
    jobs: dict[str, str] = {}
    for step, script in rendered.items():
        path = folder / f"{step}.sbatch"
        write(path, script)
        try:
            jobs[step] = commands.submit(path, folder / f"{step}.{JOB}", list(jobs.values())[-1:])
        except (commands.SlurmError, OSError):
            commands.cancel(list(jobs.values()))
            raise
    return jobs
