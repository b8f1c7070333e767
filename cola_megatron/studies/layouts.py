"""Layouts of a study's runs on GPUs: those that their configs have, and the fastest that fit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cola_megatron.config import ConfigError, RunConfig
from cola_megatron.families import family_of
from cola_megatron.planning.compute import compute_of
from cola_megatron.planning.hardware import GPUS
from cola_megatron.planning.plan import CHOICES, CONTEXT, RECOMPUTE, Cluster, Layout, choices_of, layout_of
from cola_megatron.planning.plan import plan as rank
from cola_megatron.studies.expansion import expand
from cola_megatron.studies.study_file import StudyConfig


def laid_out(study: StudyConfig, gpus: int, gpus_per_node: int) -> StudyConfig:
    """The study with the layout of every run on so many GPUs, where its file asks for layouts; else the study itself.

    Raises:
        ConfigError: the GPU is not in the table of docs/planning.md, or the GPUs cannot be shared so.
        PlanError: a run does not fit.
    """
    if study.layouts is None:
        return study
    bare = study.model_copy(update={"layouts": study.layouts.model_copy(update={"of_runs": {}})})
    cluster = cluster_of(study.layouts.gpu, gpus, gpus_per_node)
    planner = LayoutPlanner(study, cluster)
    # Where the folder lies makes no difference to a layout.
    found = {name: planner.fastest(run.config).choices for name, run in expand(bare, Path("STUDY")).runs.items()}
    return study.model_copy(update={"layouts": study.layouts.model_copy(update={"gpus": gpus, "of_runs": found})})


def cluster_of(gpu: str, gpus: int, gpus_per_node: int) -> Cluster:
    """GPUs of the table of docs/planning.md; raises ConfigError for another."""
    if gpu not in GPUS:
        raise ConfigError(f"{gpu}: not in the table of {', '.join(GPUS)}; docs/planning.md says how to add one")
    return Cluster(gpus, GPUS[gpu], GPUS[gpu].memory_bytes, gpus_per_node)


class LayoutPlanner:
    """Plans the runs of a study; those that differ in seed, length, rate or data alone have one layout.

    What the study's file sets itself is kept, and recomputation where budgets are counted by it.
    """

    def __init__(self, study: StudyConfig, cluster: Cluster):
        self.cluster = cluster
        self.held = set(CHOICES) & set(_keys(study))
        if study.budgets.column == "hardware":
            self.held.add(RECOMPUTE)
        self._known: dict[str, Layout] = {}

    def fastest(self, config: RunConfig) -> Layout:
        """Of the layouts that fit; raises ConfigError, PlanError."""
        training, family = config.training, family_of(config)
        period = family.period(config)  # what is trained in it differs with the VAE's update
        held = {name: value for name, value in choices_of(config).items() if name in {*self.held, CONTEXT}}
        key = (
            f"{family.describe(config)} {config.model!r} {training.global_batch_size} {training.precision} "
            f"{config.data.sequence_length} {compute_of(config, period)['model'] / period} {held}"
        )
        if key not in self._known:
            self._known[key] = rank(config, self.cluster, self.held)[0][0]
        return self._known[key]

    def own(self, config: RunConfig) -> Layout:
        """As the config has it, whether it fits or not; raises ConfigError where the GPUs cannot be shared so."""
        return layout_of(config, self.cluster)


def _keys(study: StudyConfig) -> Iterable[str]:
    """All keys that its file sets."""
    sections: list[dict[str, Any]] = [study.overrides]
    for arm in study.arms.values():
        sections += [arm.overrides, arm.stage_one or {}, *arm.sizes.values()]
    for axis in study.axes.values():
        sections += axis.settings.values()
    return (key for section in sections for key in section)
