"""A study on Slurm: its data, arrays of runs, an array of measurements for each of them, and the report.

Runs that come after the same kinds of runs are one array, which begins when the arrays that it starts from have ended,
whatever became of their elements: a run whose stage 1 or trunk failed says so and fails at once, the others train.
What is measured of an array's runs waits for that array alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cola_megatron.errors import UserError
from cola_megatron.studies.folder import StudyFolder
from cola_megatron.studies.runs import DATA, StudyRun
from launchers.slurm import array, commands
from launchers.slurm.queue import refuse_second
from launchers.slurm.render import Shape, container_command, gpu_directives, render
from launchers.slurm.site import Site, site_without_gpus
from launchers.slurm.submission import JOB, SUBMISSIONS, check_layout, next_folder, write
from launchers.sweep_jobs import Job, check_settings, preparation

MEASURE, REPORT, POINTS = "measure", "report", "measure.points"
NUMBER = '"$SLURM_ARRAY_TASK_ID"'
MAX_ARRAY_CURE = "take seeds, sizes or budgets out of the study, and put them back when these have finished"


@dataclass(frozen=True)
class Part:
    """One job of the chain."""

    name: str
    elements: int
    job: str
    log: str
    """Pattern of its files."""


@dataclass
class _Array:
    """Runs that may begin at the same time."""

    runs: list[StudyRun] = field(default_factory=list)
    after: set[str] = field(default_factory=set)
    """Arrays that they start from."""


@dataclass(frozen=True)
class StudyOnSlurm:
    """A study that is to be submitted."""

    opened: StudyFolder
    site: Site
    shape: Shape
    concurrency: int | None
    """Elements of an array at a time."""

    def dry_run(self) -> str:
        """All scripts, one after another; nothing is written. Raises ConfigError where a run does not fit the shape."""
        check_settings(self.opened.study, self.opened.expanded)
        folder = self.opened.folder / SUBMISSIONS / "NNNN"
        texts = [self._script(DATA, folder)] if self._data_left else []
        for name, each in self._arrays.items():
            configs = [run.config for run in each.runs]
            texts.append(array.dry_script(self._titled(name), configs, self.site, self.shape, self.concurrency))
        texts += [self._script(MEASURE, folder, len(points)) for points in self._points_left.values()]
        return "\n".join([*texts, self._script(REPORT, folder)])

    def submit(self) -> list[Part]:
        """Writes and submits what is not finished.

        Raises:
            ConfigError: a run does not fit the shape, or a setting of measurements is unknown.
            SlurmError: Slurm refuses a part; what it had accepted is cancelled.
            UserError: something of this study is in the queue already.
        """
        refuse_second(self.opened.folder)
        check_settings(self.opened.study, self.opened.expanded)
        for each in self._arrays.values():
            for run in each.runs:
                check_layout(run.config, self.shape)
        sizes = [*map(len, self._points_left.values()), *(len(each.runs) for each in self._arrays.values())]
        commands.check_array_size(max(sizes, default=1), MAX_ARRAY_CURE)
        folder = next_folder(self.opened.folder)
        parts: dict[str, Part] = {}
        try:
            if self._data_left is not None:
                parts[DATA] = self._submit_command(DATA, folder)
            data = [part.job for part in parts.values()]  # without them nothing can be trained
            for name, each in self._arrays.items():
                before = [parts[other].job for other in each.after]
                parts[name] = self._submit_runs(name, each.runs, data, before)
            before = [part.job for name, part in parts.items() if name != DATA]
            for name, points in self._points_left.items():
                after = [parts[name].job] if name else []
                part = self._submit_measurements(name, points, data, after)
                parts[part.name] = part
                before.append(part.job)
            parts[REPORT] = self._submit_command(REPORT, folder, before)
        except (UserError, OSError):
            commands.cancel([part.job for part in parts.values()])
            raise
        return list(parts.values())

    @cached_property
    def _arrays(self) -> dict[str, _Array]:
        """Of what is not finished, by the kinds of runs on the way there: stage_one, stage_one-run, ..."""
        found: dict[str, _Array] = {}
        array_of: dict[str, str] = {}
        for run in self.opened.expanded.runs.values():
            if self.opened.state_of(run.name) == "finished":
                continue
            before = [array_of[need] for need in run.needs if need in array_of]
            name = array_of[run.name] = "-".join([*before, run.role])
            found.setdefault(name, _Array()).runs.append(run)
            found[name].after.update(before)
        return found

    @cached_property
    def _points_left(self) -> dict[str, list[str]]:
        """Names of the points that are not measured in full, those that share their measurements once.

        By the array of their runs; "": these are finished.
        """
        array_of = {run.name: name for name, each in self._arrays.items() for run in each.runs}
        found: dict[str, list[str]] = {}
        for point in self.opened.expanded.measured_once():
            if self.opened.missing_measures(point):
                found.setdefault(array_of.get(point.run, ""), []).append(point.name)
        return found

    @cached_property
    def _data_left(self) -> Job | None:
        """None: the data are there."""
        if self.opened.study.data.path is not None:
            return None
        job = preparation(self.opened)
        return None if job.is_done() else job

    def _titled(self, name: str) -> str:
        return f"{self.opened.study.name}-{name}"

    def _submit_runs(self, name: str, runs: Sequence[StudyRun], data: list[str], before: list[str]) -> Part:
        for run in runs:
            self.opened.prepare(run)
        configs = [run.config for run in runs]
        written = array.write_array(self._titled(name), configs, self.site, self.shape, self.concurrency)
        written.validate()
        job = written.submit(data, before)
        return Part(name, len(runs), job, str(written.folder / f"slurm-{job}_*.log"))

    def _submit_measurements(self, after: str, points: Sequence[str], data: list[str], before: list[str]) -> Part:
        """In a folder of its own, whose job ids are those of the points beside them."""
        folder, name = next_folder(self.opened.folder), f"{MEASURE}-{after}" if after else MEASURE
        # By name: the study may have more points when they are measured.
        write(folder / POINTS, "".join(f"{point}\n" for point in points))
        job = self._submit_script(MEASURE, folder, self._script(MEASURE, folder, len(points)), data, before)
        return Part(name, len(points), job, str(folder / f"{MEASURE}-{job}_*.log"))

    def _submit_command(self, name: str, folder: Path, after_any: Sequence[str] = ()) -> Part:
        job = self._submit_script(name, folder, self._script(name, folder), [], after_any)
        return Part(name, 1, job, str(folder / f"{name}-{job}.log"))

    def _submit_script(self, name: str, folder: Path, text: str, after: Sequence[str], after_any: Sequence[str]) -> str:
        path = folder / f"{name}.sbatch"
        write(path, text)
        commands.test_only(str(path))
        return commands.submit(path, folder / JOB, after, after_any=after_any)

    def _script(self, name: str, folder: Path, elements: int = 1) -> str:
        site = self.site if name == MEASURE else site_without_gpus(self.site)
        return render(
            "command.sbatch.j2",
            title=f"Part {name} of the study {self.opened.study.name} in {self.opened.folder}",
            site=site,
            name=self._titled(name),
            log=str(folder / (f"{name}-%A_%a.log" if name == MEASURE else f"{name}-%j.log")),
            resources=[f"--chdir={Path.cwd()}", "--nodes=1", "--ntasks=1", *self._resources(name, elements)],
            commands=self._commands(name, site, folder),
        )

    def _commands(self, name: str, site: Site, submission: Path) -> list[str]:
        folder = str(self.opened.folder)
        if name == MEASURE:
            return [f"{container_command(site, ['sweep', 'measure', folder, str(submission / POINTS)])} {NUMBER}"]
        if name == REPORT:
            return [container_command(site, ["sweep", each, folder]) for each in ("collect", "report")]
        assert self._data_left is not None, "asked only where data are to be prepared"
        return [container_command(site, list(words)) for words in self._data_left.words()]

    def _resources(self, name: str, elements: int) -> list[str]:
        """The data take the cores of a node, a measurement those of one process and a GPU where there are any."""
        cores = self.site.cpus_per_node
        if name == DATA:
            return [f"--cpus-per-task={cores}"] if cores else []
        if name == REPORT:
            return []
        limit = f"%{self.concurrency}" if self.concurrency else ""
        found = [f"--array=0-{elements - 1}{limit}"]
        found += [f"--cpus-per-task={max(1, cores // self.shape.processes)}"] if cores else []
        return [*found, *gpu_directives(self.site, min(1, self.site.gpus_per_node))]
