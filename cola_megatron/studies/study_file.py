"""What a study is: arms, sizes, axes, budgets and seeds, what is measured, and what is fitted. One YAML file.

    name: rq4
    arms:
      cola: {config: paper-2b, stage_one: {training.steps: 50000}}
      autoregressive: {config: paper-2b-autoregressive}
    budgets: {column: model, amounts: [3.9e20, 1.9e21]}
    scales:
      tiny: {arms: {cola: {config: tiny}, autoregressive: {config: tiny-autoregressive}}, budgets: {amounts: [1e12]}}

What stands under a scale is laid over the rest: mappings key by key, everything else in its place, and a key that is
null there is taken out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from cola_megatron.config import ConfigError, Section, resolve_tree
from cola_megatron.config.changes import Change
from cola_megatron.config.facts import OURS
from cola_megatron.config.types import NOT_BOOL, Float, NonNegativeInt, PositiveFloat, PositiveInt
from cola_megatron.config.yaml_files import read_yaml
from cola_megatron.scaling.rules import Batch, LearningRate

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Share = Annotated[float, Field(ge=0, lt=1), NOT_BOOL]
Overrides = dict[str, Any]
"""Keys of a config, dotted, and their values."""
PROMPT_LENGTH, PARITIES = "prompt_length", ("odd", "even")
"""What items are chosen by (`varies: items`)."""
PUBLISHED_SCALE = "published"
"""The file without any of its scales."""
_SCALES = "scales"


class ArmConfig(Section):
    """One of the models that are compared, at all sizes, budgets and seeds."""

    config: Annotated[str, OURS]
    """A preset, or a YAML file of a run."""
    title: Annotated[str | None, OURS] = None
    """In figures and tables; null: the arm's name."""
    overrides: Annotated[Overrides, OURS] = Field(default_factory=dict)
    """Keys of all its runs."""
    stage_one: Annotated[Overrides | None, OURS] = None
    """A family of two stages: keys of its first stage, over `overrides`, which is trained once for each size and seed
    and charged to every run that starts from it; null: there is none."""
    sizes: Annotated[dict[Name, Overrides], OURS] = Field(default_factory=dict)
    """Keys of each size; none: the config as it is."""
    generation: Annotated[Overrides, OURS] = Field(default_factory=dict)
    """Settings of generation where it is evaluated, as `--set` of `cola eval run` takes them."""
    likelihood: Annotated[Overrides, OURS] = Field(default_factory=dict)
    """Settings of its likelihood, as `--set` of `cola eval likelihood` takes them."""


class AxisConfig(Section):
    """Something that is varied: every setting of it, with every setting of the other axes."""

    title: Annotated[str | None, OURS] = None
    """In figures and tables; null: the axis' name."""
    settings: Annotated[dict[str, Overrides], OURS]
    """The keys that each setting sets, by its label, in the order of figures: numbers ascend, others as they stand."""
    arms: Annotated[list[Name] | None, OURS] = None
    """The arms that it is varied in; null: all."""
    varies: Annotated[Literal["training", "both_stages", "generation", "items"], OURS] = "training"
    """What the keys are of: training, with one stage 1 for all settings; both stages; generation, where the settings
    are of the measurement and share their runs; or items, where they share the measurement too and each counts a part
    of it: `prompt_length: odd` or `even`, the items of last word and tasks whose prompt has so many tokens."""

    @field_validator("settings")
    @classmethod
    def _in_order(cls, settings: dict[str, Overrides]) -> dict[str, Overrides]:
        if not settings:
            raise ValueError("settings is empty: give a label and its keys for each")
        with contextlib.suppress(ValueError):  # a scale adds its own behind those of the file
            return dict(sorted(settings.items(), key=lambda each: float(each[0])))
        return settings

    @model_validator(mode="after")
    def _consistent(self) -> AxisConfig:
        for label, keys in self.settings.items() if self.varies == "items" else ():
            if [*keys] != [PROMPT_LENGTH] or keys[PROMPT_LENGTH] not in PARITIES:
                raise ValueError(f"settings.{label}: items are chosen by {PROMPT_LENGTH}: {' or '.join(PARITIES)}")
        return self


class BudgetsConfig(Section):
    """How long the runs are."""

    column: Annotated[Literal["nominal", "model", "hardware", "tokens", "steps"], OURS] = "model"
    """What the amounts count: FLOPs by the paper (6 N D), as the model does them, as the hardware does them with
    recomputation; tokens; or optimiser steps."""
    amounts: Annotated[list[PositiveFloat], Field(min_length=1), OURS]
    """One run of every arm, size, setting and seed for each."""
    with_stage_one: Annotated[bool, OURS] = True
    """Stage 1 is paid out of the budget (model and hardware FLOPs; on the paper's axis it costs nothing)."""
    runs: Annotated[Literal["own", "branches", "checkpoints"], OURS] = "own"
    """own: each budget is a run with a schedule of its own. branches: one trunk at constant rate for all budgets, and
    from its checkpoints a branch with a decay for each (warm-up, stable, decay). checkpoints: budgets are checkpoints
    of one run, whose schedule is its config's."""
    warmup_share: Annotated[Share | None, OURS] = None
    """Of the steps of a run (branches: of the smallest budget's); null: the config's `warmup_steps`."""
    decay_share: Annotated[float, Field(gt=0, lt=1), NOT_BOOL, OURS] = 0.2
    """branches: the decay's share of the steps."""

    @model_validator(mode="after")
    def _consistent(self) -> BudgetsConfig:
        if len(set(self.amounts)) < len(self.amounts):
            raise ValueError(f"amounts={self.amounts}: one stands twice")
        return self


class DataOfStudy(Section):
    """What all arms are trained on."""

    path: Annotated[str | None, OURS] = None
    """Prepared data; null: `source` is prepared into the study's folder."""
    source: Annotated[str | None, OURS] = None
    """A recipe (YAML), or `embedded`: the documentation that ships with Python."""


class MeasuresConfig(Section):
    """What is measured of every run at every budget, beside the held-out measurements of training."""

    likelihood_texts: Annotated[NonNegativeInt, OURS] = 64
    """Held-out sequences whose likelihood, or its bound, is estimated, the same for all; 0: none."""
    last_word_items: Annotated[NonNegativeInt, OURS] = 0
    """Items of `cola eval last-word`; 0: it is left out."""
    tasks: Annotated[list[str], OURS] = Field(default_factory=list)
    """Published tasks, or `all`."""
    items: Annotated[PositiveInt | None, OURS] = None
    """Only the first items of every task."""
    benchmarks: Annotated[Path | None, OURS] = None
    """Folder of the tasks' items."""


class LayoutsConfig(Section):
    """How runs lie on GPUs."""

    gpu: Annotated[str, OURS] = "h100"
    """A GPU of the table in docs/planning.md: each run has the fastest layout that fits on as many as it is given. What
    the file sets itself of a layout is kept."""
    gpus: Annotated[PositiveInt | None, OURS] = None
    """Of each run; set by the command that plans."""
    of_runs: Annotated[dict[str, Overrides], OURS] = Field(default_factory=dict)
    """The keys of each run's layout, by its name; set by the command that plans."""


class FitConfig(Section):
    """What is fitted against compute."""

    loss: Annotated[str | None, OURS] = "nats_per_token"
    """A measure that falls towards a floor; null: none."""
    score: Annotated[str | None, OURS] = None
    """A measure that rises to a ceiling, in 0 .. 1, such as `last_word` or `task_average`; null: none."""
    chance: Annotated[Share, OURS] = 0.0
    """Score of guessing."""


class PublishedPoint(Section):
    """A figure of the paper, to stand beside ours."""

    arm: Annotated[Name, OURS]
    settings: Annotated[dict[str, str], OURS] = Field(default_factory=dict)
    """Label of each axis."""
    column: Annotated[Literal["nominal", "model", "hardware"], OURS] = "nominal"
    compute: Annotated[PositiveFloat | None, OURS] = None
    """FLOPs in that column; null: it was not said."""
    score: Annotated[Float | None, OURS] = None
    """In 0 .. 1, to stand beside the measure that is fitted as a score."""
    loss: Annotated[PositiveFloat | None, OURS] = None
    """To stand beside the one that is fitted as a loss, in its unit."""

    @model_validator(mode="after")
    def _consistent(self) -> PublishedPoint:
        if self.score is None and self.loss is None:
            at = "" if self.compute is None else f" at {self.compute:.3g} FLOPs"
            raise ValueError(f"the point of {self.arm}{at} has neither score nor loss")
        return self


class StudyConfig(Section):
    """A study at one scale."""

    history: ClassVar[Sequence[Change] | None] = ()

    name: Annotated[Name, OURS]
    """Of the study, not of its folder."""
    title: Annotated[str, OURS] = ""
    """Heading of the report."""
    question: Annotated[str, OURS] = ""
    """What it is to answer, in a sentence."""
    scale: Annotated[str, OURS] = PUBLISHED_SCALE
    """Which of the file's scales this is; set by `--scale`."""
    arms: Annotated[dict[Name, ArmConfig], Field(min_length=1), OURS]
    """In the order of figures."""
    overrides: Annotated[Overrides, OURS] = Field(default_factory=dict)
    """Keys of all runs of all arms, both stages."""
    axes: Annotated[dict[Name, AxisConfig], OURS] = Field(default_factory=dict)
    """What is varied beside size, budget and seed."""
    budgets: BudgetsConfig
    learning_rate: Annotated[LearningRate | None, OURS] = None
    """A rule that sets it for every run after stage 1 from its size and length (docs/scaling.md lists them); null: the
    config's, as that of stage 1 always is."""
    batch: Annotated[Batch | None, OURS] = None
    """A rule for the global batch, likewise."""
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1), OURS] = Field(default_factory=lambda: [66])
    """`seed` of the runs; the order of the data is that of the config for all of them."""
    data: DataOfStudy = DataOfStudy()
    layouts: Annotated[LayoutsConfig | None, OURS] = None
    """Layouts are planned; null: those of the configs."""
    measures: MeasuresConfig = MeasuresConfig()
    fit: FitConfig = FitConfig()
    published: Annotated[list[PublishedPoint], OURS] = Field(default_factory=list)
    """Numbers of the paper."""

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={self.seeds}: one stands twice, which would be two equal runs")
        named = [("axes." + axis, arm) for axis, each in self.axes.items() for arm in each.arms or ()]
        for where, arm in [*named, *(("published", each.arm) for each in self.published)]:
            if arm not in self.arms:
                raise ValueError(f"{where} names the arm {arm}, and the arms are {', '.join(self.arms)}")
        if (self.data.path is None) == (self.data.source is None):
            raise ValueError("data needs one of path and source")
        measures = self.measures
        if bool(measures.tasks) != (measures.benchmarks is not None):
            raise ValueError("measures needs tasks and benchmarks together: what is asked, and where its items lie")
        return self

    def axes_of(self, arm: str, *kinds: str) -> dict[str, AxisConfig]:
        """The axes that an arm is varied along, of these values of `varies`."""
        return {
            name: axis
            for name, axis in self.axes.items()
            if axis.varies in kinds and (axis.arms is None or arm in axis.arms)
        }


def load_study(
    path: Path, scale: str | None = None, data: str | None = None, benchmarks: Path | None = None
) -> StudyConfig:
    """Reads a study.

    Args:
        scale: a name under `scales`; None: the file without any.
        data: prepared data in place of the file's.
        benchmarks: folder of the tasks' items, in place of the file's.

    Raises:
        ConfigError: no such file, scale or key, or values that do not go together.
    """
    tree = read_yaml(path)
    scales = tree.pop(_SCALES, None) or {}
    if scale not in (None, PUBLISHED_SCALE):
        if scale not in scales:
            raise ConfigError(f"{path} has no scale {scale}; its scales are {', '.join([PUBLISHED_SCALE, *scales])}")
        tree = laid_over(tree, scales[scale])
        tree["scale"] = scale
    if data is not None:
        tree["data"] = {"path": data}
    if benchmarks is not None:
        tree["measures"] = {**(tree.get("measures") or {}), "benchmarks": str(benchmarks)}
    try:
        return _from_anywhere(resolve_tree(StudyConfig, tree))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _from_anywhere(study: StudyConfig) -> StudyConfig:
    """With absolute paths: a study is gone on with from other working directories, as of a job's."""
    arms = {name: arm.model_copy(update={"config": _absolute(arm.config)}) for name, arm in study.arms.items()}
    data = {"path": _absolute(study.data.path, is_path=True), "source": _absolute(study.data.source)}
    benchmarks = study.measures.benchmarks
    measures = {"benchmarks": None if benchmarks is None else benchmarks.expanduser().absolute()}
    return study.model_copy(
        update={
            "arms": arms,
            "data": study.data.model_copy(update=data),
            "measures": study.measures.model_copy(update=measures),
        }
    )


def _absolute(given: str | None, is_path: bool = False) -> str | None:
    """Of a path; a URL and what is the name of something stay."""
    if given is None or "://" in given or not (is_path or given.endswith((".yaml", ".yml")) or Path(given).is_file()):
        return given
    return str(Path(given).expanduser().absolute())


def laid_over(tree: Mapping[str, Any], over: Mapping[str, Any] | None) -> dict[str, Any]:
    """The tree with another over it; a key that is null there is taken out."""
    merged = dict(tree)
    for key, value in (over or {}).items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = laid_over(merged[key], value)
        else:
            merged[key] = value
    return merged
