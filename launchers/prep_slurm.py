"""`cola prep submit`: the steps of a preparation as Slurm job arrays, each after the one before."""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, StrictUndefined

from cola_megatron.errors import UserError
from data_prep.plan import Plan
from data_prep.steps import steps_of
from data_prep.work import WorkFolder

TEMPLATE = "prep.sbatch.j2"


@dataclass(frozen=True)
class ArraySettings:
    """How the arrays run."""

    elements: int
    """Largest size of an array (Slurm's default MaxArraySize allows 1000); an element does every so-many-th task."""
    concurrency: int | None
    """Elements that run at once."""
    directives: tuple[str, ...]
    """Lines for #SBATCH, such as `--partition=cpu`."""
    setup: tuple[str, ...]
    """Lines of shell before the command, such as `module load python`."""


def scripts(plan: Plan, work: WorkFolder, settings: ArraySettings) -> dict[str, str]:
    """The batch script of every step that has unfinished tasks, in order."""
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string((resources.files("slurm") / TEMPLATE).read_text(encoding="utf-8"))
    rendered = {}
    for step in steps_of(plan):
        if all(work.is_finished(step.name, task) for task in range(step.tasks)):
            continue
        rendered[step.name] = template.render(
            step=step.name,
            tasks=step.tasks,
            elements=min(step.tasks, settings.elements),
            work=shlex.quote(str(work.path)),
            concurrency=settings.concurrency,
            directives=settings.directives,
            setup=settings.setup,
            python=shlex.quote(sys.executable),
        )
    return rendered


def submit(work: WorkFolder, rendered: dict[str, str]) -> dict[str, str]:
    """Writes the scripts into the work folder and submits them; returns the job id of each step.

    Raises:
        UserError: there is no Slurm here, or it refuses a job; jobs that were already accepted are cancelled.
    """
    folder = work.path / "scripts"
    for name in (folder, work.path / "logs"):
        name.mkdir(exist_ok=True)
    jobs: dict[str, str] = {}
    for step, script in rendered.items():
        path = folder / f"{step}.sbatch"
        path.write_text(script, encoding="utf-8")
        after = [f"--dependency=afterok:{list(jobs.values())[-1]}", "--kill-on-invalid-dep=yes"] if jobs else []
        try:
            jobs[step] = _run(["sbatch", "--parsable", *after, str(path)]).split(";")[0]
        except UserError:
            if jobs:
                _run(["scancel", *jobs.values()])
            raise
    return jobs


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not found; submit where Slurm is, or use `cola prep run`") from None
    if done.returncode:
        raise UserError(f"{command[0]}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout.strip()
