"""A study on Slurm: an array for each kind of run, one after another, an array of measurements, and the report.

An array begins when the one before it has ended, whatever became of its elements: a run whose stage 1 or trunk failed
says so and fails at once, the others train.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cola_megatron.scaling.study_folder import StudyFolder
from cola_megatron.scaling.study_runs import DATA, StudyRun
from launchers.slurm import array, commands
from launchers.slurm.queue import refuse_second
from launchers.slurm.render import Shape, container_command, gpu_directives, render
from launchers.slurm.site import Site, site_without_gpus
from launchers.slurm.submission import JOB, next_folder, write
from launchers.sweep_jobs import jobs_of

ROLES = ("stage_one", "trunk", "run")
NUMBER = '"$SLURM_ARRAY_TASK_ID"'


@dataclass(frozen=True)
class Part:
    """One job of the chain."""

    name: str
    elements: int
    job: str | None
    """None: not submitted, or nothing is left to do."""
    log: str


@dataclass(frozen=True)
class StudyOnSlurm:
    """A study that is to be submitted."""

    opened: StudyFolder
    site: Site
    shape: Shape
    concurrency: int | None
    """Elements of an array at a time."""

    def dry_run(self) -> str:
        """All scripts, one after another; nothing is written but by `StudyFolder.begin`."""
        folder = self.opened.folder / "submissions" / "NNNN"
        texts = [self._script(name, folder) for name in (DATA, "measure", "report") if self._is_left(name)]
        for role, runs in self._left().items():
            configs = [run.config for run in runs]
            texts.insert(-2, array.dry_script(f"{self._name}-{role}", configs, self.site, self.shape, self.concurrency))
        return "\n".join(texts)

    def submit(self) -> list[Part]:
        """Writes and submits what is not finished.

        Raises:
            SlurmError: Slurm refuses a part; what it had accepted is cancelled.
            UserError: something of this study is in the queue already.
        """
        refuse_second(self.opened.folder)
        commands.check_array_size(max(len(self.opened.expanded.points), *map(len, self._left().values()), 1))
        folder = next_folder(self.opened.folder)
        parts: list[Part] = []
        try:
            last = self._submit_command(DATA, folder, parts, []) if self._is_left(DATA) else []
            for role, runs in self._left().items():
                last = self._submit_runs(role, runs, parts, last)
            for name in ("measure", "report"):
                if self._is_left(name):
                    last = self._submit_command(name, folder, parts, last)
        except (commands.SlurmError, OSError):
            commands.cancel([part.job for part in parts if part.job is not None])
            raise
        return parts

    @property
    def _name(self) -> str:
        return self.opened.study.name

    def _left(self) -> dict[str, list[StudyRun]]:
        runs = [run for run in self.opened.expanded.runs.values() if self.opened.state_of(run.name) != "finished"]
        found = {role: [run for run in runs if run.role == role] for role in ROLES}
        return {role: of_role for role, of_role in found.items() if of_role}

    def _points_left(self) -> list[int]:
        points = enumerate(self.opened.expanded.points)
        return [number for number, point in points if self.opened.missing_measures(point)]

    def _is_left(self, name: str) -> bool:
        if name == DATA:
            jobs = jobs_of(self.opened)
            return DATA in jobs and not jobs[DATA].is_done()
        return name == "report" or bool(self._points_left())

    def _submit_runs(self, role: str, runs: Sequence[StudyRun], parts: list[Part], after: list[str]) -> list[str]:
        for run in runs:
            self.opened.prepare(run)
        configs = [run.config for run in runs]
        written = array.write_array(f"{self._name}-{role}", configs, self.site, self.shape, self.concurrency)
        written.validate()
        job = written.submit(after, whatever_becomes=True)
        parts.append(Part(role, len(runs), job, str(written.folder / f"slurm-{job}_*.log")))
        return [job]

    def _submit_command(self, name: str, folder: Path, parts: list[Part], after: list[str]) -> list[str]:
        path = folder / f"{name}.sbatch"
        write(path, self._script(name, folder))
        commands.test_only(str(path))
        # Without data nothing can be trained.
        job = commands.submit(path, folder / JOB, after, whatever_becomes=True)
        elements = len(self._points_left()) if name == "measure" else 1
        parts.append(Part(name, elements, job, str(folder / f"{name}-*.log")))
        return [job]

    def _script(self, name: str, folder: Path) -> str:
        site, resources = self._where(name)
        log = f"{name}-%A_%a.log" if name == "measure" else f"{name}-%j.log"
        return render(
            "command.sbatch.j2",
            title=f"Part {name} of the study {self._name} in {self.opened.folder}",
            site=site,
            name=f"{self._name}-{name}",
            log=str(folder / log),
            resources=[f"--chdir={Path.cwd()}", "--nodes=1", "--ntasks=1", *resources],
            commands=self._commands(name, site),
        )

    def _commands(self, name: str, site: Site) -> list[str]:
        folder = str(self.opened.folder)
        words: Callable[[list[str]], str] = lambda each: container_command(site, each)  # noqa: E731
        if name == DATA:
            return [words(list(each)) for each in jobs_of(self.opened)[DATA].words()]
        if name == "measure":
            return [f"{words(['sweep', 'measure', folder])} {NUMBER}"]
        return [words(["sweep", "collect", folder]), words(["sweep", "report", folder])]

    def _where(self, name: str) -> tuple[Site, list[str]]:
        """Measurements take one GPU where there are any; the rest takes cores."""
        if name != "measure":
            return site_without_gpus(self.site), []
        limit = f"%{self.concurrency}" if self.concurrency else ""
        numbers = ",".join(map(str, self._points_left()))
        return self.site, [f"--array={numbers}{limit}", *gpu_directives(self.site, min(1, self.site.gpus_per_node))]
