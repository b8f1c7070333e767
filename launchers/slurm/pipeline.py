"""The whole way from text to a report as a chain of jobs: each waits until the one before has ended well.

Everything lies in RUNS_FOLDER/NAME: stage1/ and stage2/ (run folders), export/, evaluation/, report.html, and in
submissions/ the scripts of the parts that do not train. The same command goes on with what is not finished.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from cola_megatron.config import ConfigError, RunConfig, load_config
from data_prep.plan import Plan, make_plan, work_folder_of
from data_prep.prepare import begin
from data_prep.recipe import Recipe
from launchers import prep_slurm
from launchers.slurm import commands
from launchers.slurm.queue import refuse_second
from launchers.slurm.render import Shape, container_command, gpu_directives, render, training_script
from launchers.slurm.runs import has_finished
from launchers.slurm.site import Site, site_without_gpus
from launchers.slurm.submission import JOB, check_layout, check_name, next_folder, write, write_training

__all__ = ["Part", "Pipeline", "plan_pipeline"]

PIPELINE = "pipeline.json"


@dataclass(frozen=True)
class Part:
    """One job of the chain, or what is finished already."""

    name: str
    job: str | None
    """None: nothing is left to do."""
    log: str


@dataclass(frozen=True)
class Pipeline:
    """A checked chain, not yet written."""

    folder: Path
    stages: tuple[RunConfig, RunConfig]
    recipe: Recipe | None
    site: Site
    shape: Shape
    benchmarks: Path | None
    tasks: str
    limit: int | None

    @property
    def export(self) -> Path:
        """The model in the published layout."""
        return self.folder / "export"

    @property
    def evaluation(self) -> Path:
        """Results of the benchmarks."""
        return self.folder / "evaluation"

    def scripts(self) -> dict[str, str]:
        """The scripts of the parts after training, by name."""
        first, second = (Path.cwd() / stage.run_folder for stage in self.stages)
        parts = {"export": [["convert", "export", str(second), str(self.export)]]}
        report = ["report", str(second), "--stage-one", str(first), "--export", str(self.export)]
        report += ["--output", str(self.folder)]
        if self.benchmarks is not None:
            limit = ["--limit", str(self.limit)] if self.limit else []
            words = ["eval", "run", str(self.export), "--data", str(self.benchmarks), "--tasks", self.tasks]
            words += ["--output", str(self.evaluation), *limit]
            parts["evaluate"] = [["launch", "--nproc", str(self.shape.processes), *words]]
            report += ["--evaluation", str(self.evaluation)]
        parts["report"] = [report]
        return {name: self._script(name, commands) for name, commands in parts.items()}

    def dry_run(self) -> str:
        """All scripts, one after another."""
        texts: list[str] = []
        if self.recipe is not None:
            plan = make_plan(self.recipe)
            texts += prep_slurm.scripts(plan, work_folder_of(self.recipe.output), self._arrays()).values()
        for stage in self.stages:
            folder = Path.cwd() / stage.run_folder / "submissions" / "NNNN"
            texts.append(training_script(self.site, self.shape, stage.name, folder, Path.cwd()))
        return "\n".join([*texts, *self.scripts().values()])

    def submit(self) -> list[Part]:
        """Writes and submits what is not finished, in order.

        Raises:
            SlurmError: Slurm refuses a part; what it had accepted is cancelled.
            UserError: this chain, or the preparation of its data, is in the queue already.
        """
        refuse_second(self.folder, *([self.recipe.output.expanduser()] if self.recipe is not None else []))
        folder = next_folder(Path.cwd() / self.folder)
        parts: list[Part] = []
        try:
            last = self._submit_preparation(parts)
            # They lie elsewhere; what ends this chain ends them too.
            (folder / JOB).write_text("".join(f"{part.job}\n" for part in parts if part.job is not None))
            for stage in self.stages:
                last = self._submit_stage(stage, parts, last)
            for name, script in self.scripts().items():
                path = folder / f"{name}.sbatch"
                write(path, script.replace("LOGS", str(folder)))
                commands.test_only(str(path))
                last = [commands.submit(path, folder / JOB, last)]
                parts.append(Part(name, last[0], str(folder / f"{name}-{last[0]}.log")))
        except (commands.SlurmError, OSError):
            commands.cancel([part.job for part in parts if part.job is not None])
            raise
        described = {part.name: {"job": part.job, "log": part.log} for part in parts}
        write(folder / PIPELINE, json.dumps(described, indent=1) + "\n")
        return parts

    def _submit_preparation(self, parts: list[Part]) -> list[str]:
        if self.recipe is None:
            return []
        plan: Plan = make_plan(self.recipe)
        work = begin(plan)
        if work is None:
            parts.append(Part("prep", None, str(self.recipe.output)))
            return []
        last: list[str] = []
        for step, job in prep_slurm.submit(work, prep_slurm.scripts(plan, work, self._arrays())).items():
            parts.append(Part(f"prep-{step}", job, str(work.path / "logs" / f"{step}-*.log")))
            last = [job]
        return last

    def _submit_stage(self, stage: RunConfig, parts: list[Part], last: list[str]) -> list[str]:
        if has_finished(Path.cwd() / stage.run_folder):
            parts.append(Part(stage.name, None, str(stage.run_folder)))
            return last
        submission = write_training(stage, self.site, self.shape)
        submission.validate()
        job = submission.submit(last)
        parts.append(Part(stage.name, job, str(submission.folder / f"slurm-{job}.log")))
        return [job]

    def _arrays(self) -> prep_slurm.ArraySettings:
        return prep_slurm.ArraySettings(site_without_gpus(self.site), elements=1000, concurrency=None)

    def _script(self, name: str, words: list[list[str]]) -> str:
        processes = self.shape.processes if name == "evaluate" else 1
        gpus = gpu_directives(self.site, min(processes, self.site.gpus_per_node))
        cores = [f"--cpus-per-task={self.site.cpus_per_node}"] if self.site.cpus_per_node else []
        return render(
            "command.sbatch.j2",
            title=f"Part {name} of {self.folder}",
            site=self.site,
            name=f"{self.folder.name}-{name}",
            log=f"LOGS/{name}-%j.log",
            resources=[f"--chdir={Path.cwd()}", "--nodes=1", "--ntasks=1", *cores, *gpus],
            commands=[container_command(self.site, each) for each in words],
        )


def plan_pipeline(
    source: str,
    overrides: list[str],
    name: str,
    of_stages: tuple[list[str], list[str]],
    recipe: Recipe | None,
    site: Site,
    shape: Shape,
    benchmarks: Path | None = None,
    tasks: str = "all",
    limit: int | None = None,
) -> Pipeline:
    """Checks a chain as far as it can be before its data exist.

    Raises:
        ConfigError: a config cannot run, the recipe makes sequences of another length, or there are no data.
    """
    check_name("--name", name)
    folder = load_config(source, [*overrides, *of_stages[0], "stage=1"]).runs_folder / name
    given = [*overrides, f"runs_folder={folder}"]
    if recipe is not None:
        given.append(f"data.path={recipe.output}")
    first = load_config(source, [*given, *of_stages[0], "stage=1", "name=stage1"])
    second = [f"training.stage_one={first.run_folder}", *of_stages[1], "stage=2", "name=stage2"]
    stages = (first, load_config(source, [*given, *second]))
    for stage in stages:
        check_layout(stage, shape)
        if stage.data.path is None:
            raise ConfigError("give --recipe, or data.path of a prepared data set")
        length = stage.data.sequence_length
        if recipe is not None and recipe.packing.sequence_length != length:
            raise ConfigError(
                f"the recipe packs sequences of {recipe.packing.sequence_length} tokens, data.sequence_length is "
                f"{length}; make them equal"
            )
    if benchmarks is not None and not benchmarks.is_dir():
        raise ConfigError(f"--benchmarks {benchmarks}: no such folder")
    return Pipeline(folder, stages, recipe, site, shape, benchmarks, tasks, limit)
