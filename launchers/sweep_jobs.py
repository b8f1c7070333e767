"""The jobs of a study and what each waits for, whoever runs them: this machine, or Slurm."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cola_megatron.config import ConfigError, RunConfig
from cola_megatron.data.manifest import MANIFEST_NAME
from cola_megatron.families import family_of
from cola_megatron.inference.requests import read_settings
from cola_megatron.planning.compute import parameters_of
from cola_megatron.planning.flops import training_flops
from cola_megatron.planning.memory import rank_memory
from cola_megatron.planning.split import pipeline_split
from cola_megatron.studies.folder import LOG, StudyFolder, last_line
from cola_megatron.studies.measured import commands
from cola_megatron.studies.runs import DATA, Expanded, Point, StudyRun
from cola_megatron.studies.study_file import StudyConfig
from launchers.generation_options import settings_of
from launchers.prep_recipes import from_file

PROCESS_BYTES = 1.2e9
"""What a process of this package takes beside its model: Python, torch and the libraries."""
CUDA_PROCESS_BYTES = 4e9
"""The same where the model lies on a GPU, with the libraries of CUDA and pinned batches: a guess, on the large side."""
COPY_BYTES = 12
"""Of host memory for each parameter, while a checkpoint is written (`training.checkpoint.asynchronous`)."""


@dataclass(frozen=True)
class Job:
    """One thing to do: a process after another, each a `cola` command."""

    name: str
    kind: str
    """data, train or measure."""
    words: Callable[[], Sequence[Sequence[str]]]
    """The commands that are left, asked when it begins."""
    is_done: Callable[[], bool]
    log: Path
    needs: tuple[str, ...] = ()
    memory: float = PROCESS_BYTES
    """Bytes that it will take here, estimated."""
    flops: float = 0.0
    """What it is expected to take, to begin with the longest."""
    run_folder: Path | None = None
    """Of training."""
    point: Point | None = field(default=None, compare=False)
    """Of a measurement."""


def jobs_of(opened: StudyFolder, processes: int = 1, on_gpus: bool = False) -> dict[str, Job]:
    """All jobs of a study, each after those that it needs.

    Args:
        processes: of each run that trains.
        on_gpus: the models lie in the memory of GPUs, of which nothing is reckoned here.

    Raises:
        ConfigError: the arms cannot share one data set, or a task or a setting of measurements is unknown.
    """
    check_settings(opened.study, opened.expanded)
    jobs: dict[str, Job] = {}
    first: tuple[str, ...] = ()
    if opened.study.data.path is None:
        jobs[DATA] = preparation(opened)
        first = (DATA,)
    for run in opened.expanded.runs.values():
        jobs[run.name] = _training(opened, run, first, processes, on_gpus)
    for point in opened.expanded.measured_once():
        measure = _measurement(opened, point, on_gpus)
        jobs[measure.name] = measure
    return jobs


def measure_point(opened: StudyFolder, name: str) -> int:
    """Runs here the commands that are left of a point; returns the exit code of the first that fails, or 0.

    What they print goes to the log beside the measurements, where `cola sweep status` finds it.

    Raises:
        ConfigError: there is no such point.
    """
    point = next((each for each in opened.expanded.points if each.name == name), None)
    if point is None:
        raise ConfigError(f"{name}: the study in {opened.folder} has no such point (any more)")
    job = _measurement(opened, point)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    for words in job.words():
        with job.log.open("ab") as log:
            command = [sys.executable, "-m", "cola_megatron", *words]
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        if code:
            print(f"{job.name}: {last_line(job.log)}; see {job.log}", file=sys.stderr)
            return code
    return 0


def with_needs(jobs: dict[str, Job], names: Sequence[str]) -> dict[str, Job]:
    """These runs, their measurements, and all that they need; raises ConfigError for a run that the study has not."""
    unknown = [name for name in names if name not in jobs]
    if unknown:
        raise ConfigError(f"{', '.join(unknown)}: the study has no such run; it has {', '.join(jobs)}")
    wanted = set(names) | {name for name, job in jobs.items() if job.kind == "measure" and set(job.needs) & set(names)}
    for name in reversed(jobs):  # what is needed stands before
        if name in wanted:
            wanted |= set(jobs[name].needs)
    return {name: job for name, job in jobs.items() if name in wanted}


def preparation(opened: StudyFolder) -> Job:
    """Of the data that the study prepares itself; raises ConfigError where its arms cannot share one data set."""
    configs = [run.config for run in opened.expanded.runs.values()]
    shapes = {(config.model.vocab_size, config.data.sequence_length) for config in configs}
    if len(shapes) > 1:
        found = ", ".join(f"{vocabulary} words in sequences of {length}" for vocabulary, length in sorted(shapes))
        raise ConfigError(f"the arms need different data ({found}): one study has one data set")
    ((vocabulary, length),) = shapes
    output, source = opened.folder / DATA, str(opened.study.data.source)
    if source.endswith((".yaml", ".yml")):
        _check_recipe(source, vocabulary, length)
        words = ["prep", "run", "--recipe", source, "--output", str(output)]
    else:
        words = ["prep", "run", source, "--output", str(output)]
        words += ["--sequence-length", str(length), "--vocab-size", str(vocabulary)]
    return Job(
        DATA,
        "data",
        lambda: [words],
        lambda: (output / MANIFEST_NAME).is_file(),
        opened.folder / "data.log",
    )


def _check_recipe(source: str, vocabulary: int, length: int) -> None:
    """Before hours of preparation; the vocabulary of a tokenizer that is given is seen when its data are read."""
    recipe = from_file(Path(source), [], None)
    wanted = [("packing.sequence_length", recipe.packing.sequence_length, "data.sequence_length", length)]
    if recipe.tokenizer.path is None:
        wanted.append(("tokenizer.vocab_size", recipe.tokenizer.vocab_size, "model.vocab_size", vocabulary))
    for key, there, own, here in wanted:
        if there != here:
            raise ConfigError(f"{source} has {key}={there}, and the runs have {own}={here}: make them equal")


def check_settings(study: StudyConfig, expanded: Expanded) -> None:
    """Of generation and likelihood, which are used when the training is over; raises ConfigError."""
    for point in expanded.points:
        family = family_of(expanded.runs[point.run].config)
        try:
            settings_of(family, dict(point.generation))
            given = dict(study.arms[point.arm].likelihood)
            read_settings(family.likelihood_settings, given, f"a likelihood by {family.title}")
        except (ConfigError, ValueError) as error:
            raise ConfigError(f"{point.name}: {error}") from None


def _training(opened: StudyFolder, run: StudyRun, first: tuple[str, ...], processes: int, on_gpus: bool) -> Job:
    folder = opened.run_folder(run.name)
    before = ["launch", "--nproc", str(processes)] if processes > 1 else []
    return Job(
        run.name,
        "train",
        lambda: [[*before, "train", str(opened.prepare(run))]],
        lambda: opened.state_of(run.name) == "finished",
        folder / LOG,
        run.needs or first,
        _memory(run.config, processes, on_gpus),
        flops=training_flops(run.config, run.config.training.steps),
        run_folder=folder,
    )


def _measurement(opened: StudyFolder, point: Point, on_gpus: bool = False) -> Job:
    study, output = opened.study, opened.measurements_of(point)
    config = opened.expanded.runs[point.run].config
    return Job(
        f"measure-{point.name}",
        "measure",
        lambda: commands(
            study.measures,
            point.generation,
            study.arms[point.arm].likelihood,
            opened.checkpoint_of(point),
            output,
            opened.data,
        ),
        lambda: not opened.missing_measures(point),
        output / LOG,
        (point.run,),
        _memory(config, 1, on_gpus),
        point=point,
    )


def _memory(config: RunConfig, processes: int, on_gpus: bool) -> float:
    """Of this machine, of all processes, as one replica each where the model is not cut."""
    if on_gpus:
        return processes * CUDA_PROCESS_BYTES + COPY_BYTES * parameters_of(config)["all"]
    parallel = config.parallel
    replicas = max(1, processes // parallel.ranks_of_a_replica)
    stages = rank_memory(config, replicas, pipeline_split(config, replicas))
    return processes * (PROCESS_BYTES + max(stage.peak for stage in stages))
