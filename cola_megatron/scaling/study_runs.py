"""From a study to its runs: one config for each run folder, and a point of the table for each run at each budget.

Everything follows from the study alone, names too, so that a study which is opened again finds its folders.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cola_megatron.checkpoint.folder import folder_of
from cola_megatron.config import ConfigError, RunConfig, load_config, stored_tree
from cola_megatron.planning.compute import compute_of, steps_for
from cola_megatron.scaling.study_file import AxisConfig, Overrides, StudyConfig

RUNS, DATA = "runs", "data"
"""In the folder of a study."""
Role = Literal["stage_one", "trunk", "run"]
_STAGE_ONE = "training.stage_one"
_OF_TRAINING = ("training", "both_stages")
PLACES = ("runs_folder", "name", "data.path", _STAGE_ONE, "training.start_from", "training.log.wandb_group")
"""Keys that say where a run lies and where it comes from, which its name says as well."""


@dataclass(frozen=True)
class StudyRun:
    """A run folder of a study."""

    name: str
    role: Role
    config: RunConfig
    needs: tuple[str, ...] = ()
    """Runs that must have ended before: the stage 1 or the trunk that it starts from."""


@dataclass(frozen=True)
class Point:
    """One row of the table: a run at a step."""

    name: str
    arm: str
    size: str
    settings: Mapping[str, str]
    """Label of each axis that its arm has."""
    generation: Overrides
    """Settings of generation, those of its arm among them."""
    measured_as: str
    """Folder of its measurements below those of its run; points of one run differ in it."""
    seed: int
    budget: float
    run: str
    step: int
    stage_one: str | None
    trunk: str | None


@dataclass(frozen=True)
class Expanded:
    """All of a study."""

    runs: Mapping[str, StudyRun]
    """In an order in which each comes after what it needs."""
    points: Sequence[Point]


def fork_step(branch: StudyRun) -> int:
    """The step at which a branch leaves its trunk."""
    step = branch.config.training.schedule.decay_from
    assert step is not None, "a branch decays from where it begins"
    return step


def expand(study: StudyConfig, folder: Path) -> Expanded:
    """The runs and points of a study in this folder.

    Raises:
        ConfigError: an arm, setting or budget that makes no run, and two that make the same.
    """
    runs: dict[str, StudyRun] = {}
    by_identity: dict[str, StudyRun] = {}
    measured: dict[tuple[str, int, str], Point] = {}
    points: list[Point] = []
    for builder in _lines(study, folder.absolute()):
        first = builder.stage_one()
        if first is not None:
            first = by_identity.setdefault(_identity(first), first)  # one for all arms and settings that share it
            runs[first.name] = first
        line = builder.build(first)
        same = {run.name: by_identity.setdefault(_identity(run), run) for run in line.runs}
        for run in line.runs:
            if same[run.name] is run and run.name in runs:
                raise ConfigError(f"two runs have the name {run.name}: labels must differ in their letters and digits")
            runs.setdefault(same[run.name].name, same[run.name])
        for point in (replace(point, run=same[point.run].name) for point in line.points):
            other = measured.setdefault((point.run, point.step, json.dumps(point.generation, sort_keys=True)), point)
            if other is not point:
                raise ConfigError(
                    f"{point.name} and {other.name} are two equal runs: leave out an arm, size or setting"
                )
            points.append(point)
    return Expanded(runs, points)


def _identity(run: StudyRun) -> str:
    return json.dumps([run.role, run.needs, identity_of(run.config)], sort_keys=True)


@dataclass(frozen=True)
class _Line:
    """The runs of one arm at one size, setting and seed, over all budgets."""

    runs: list[StudyRun]
    points: list[Point]


def _lines(study: StudyConfig, folder: Path) -> Iterator[_LineBuilder]:
    for arm, of_arm in study.arms.items():
        combinations = _combinations(study.axes_of(arm, *_OF_TRAINING))
        for size, settings, seed in itertools.product(of_arm.sizes or {"": {}}, combinations, study.seeds):
            yield _LineBuilder(study, folder, arm, size, settings, seed)


def _combinations(axes: Mapping[str, AxisConfig]) -> list[dict[str, str]]:
    """A label of every axis, in all ways; of no axis, one."""
    labels = ([(name, label) for label in axis.settings] for name, axis in axes.items())
    return [dict(chosen) for chosen in itertools.product(*labels)]


class _LineBuilder:
    """Configs of one line: the keys of the study, of the arm, of the size, of the settings, in that order."""

    def __init__(self, study: StudyConfig, folder: Path, arm: str, size: str, settings: dict[str, str], seed: int):
        self.study, self.folder, self.arm, self.size = study, folder, arm, size
        self.settings, self.seed = settings, seed

    def build(self, first: StudyRun | None) -> _Line:
        """The runs after stage 1, and their points; raises ConfigError."""
        study, base = self.study, self._keys(self.settings)
        if first is not None:
            base[_STAGE_ONE] = str(first.config.run_folder)
        probe = self._load(self.name, base)
        lengths = {amount: self._steps(probe, first, amount) for amount in sorted(study.budgets.amounts)}
        if len(set(lengths.values())) < len(lengths):
            raise ConfigError(f"{self.name}: two budgets are {self._twice(lengths)} steps each; give others")
        build = {"own": self._own, "branches": self._branches, "checkpoints": self._checkpoints}[study.budgets.runs]
        runs, points = build(base, lengths, first)
        return _Line(runs, points)

    @property
    def name(self) -> str:
        """Of the line: the arm, its size and its settings."""
        return self._named("", self.settings)

    def _keys(self, settings: Mapping[str, str]) -> Overrides:
        study, of_arm = self.study, self.study.arms[self.arm]
        keys: Overrides = {**study.overrides, **of_arm.overrides, **of_arm.sizes.get(self.size, {})}
        for axis, label in settings.items():
            keys |= study.axes[axis].settings[label]
        data = study.data.path or str(self.folder / DATA)
        return {**keys, "seed": self.seed, "data.path": data, "training.log.wandb_group": study.name}

    def stage_one(self) -> StudyRun | None:
        """None: the arm has none, or this setting says itself what it starts from."""
        own, axes = self.study.arms[self.arm].stage_one, self.study.axes_of(self.arm, "both_stages")
        if own is None or _STAGE_ONE in self._keys(self.settings):
            return None
        settings = {axis: label for axis, label in self.settings.items() if axis in axes}
        name = self._named(f"stage1-s{self.seed}", settings)
        return StudyRun(name, "stage_one", self._load(name, {**self._keys(settings), **own, "stage": 1}))

    def _steps(self, config: RunConfig, first: StudyRun | None, amount: float) -> int:
        column, left = self.study.budgets.column, amount
        if first is not None and self.study.budgets.with_stage_one and column in ("model", "hardware"):
            spent = compute_of(first.config, first.config.training.steps)[column]
            left -= spent
            if left <= 0:
                raise ConfigError(
                    f"{self.name}: stage 1 ({first.name}) alone takes {spent:.3g} FLOPs of a budget of {amount:.3g}; "
                    "give larger budgets, a shorter stage_one, or budgets.with_stage_one: false"
                )
        try:
            return steps_for(config, column, left)
        except ConfigError as error:
            raise ConfigError(f"{self.name}, budget {amount:.3g}: {error}") from None

    def _own(
        self, base: Overrides, lengths: Mapping[float, int], first: StudyRun | None
    ) -> tuple[list[StudyRun], list[Point]]:
        runs = []
        for budget, steps in lengths.items():
            keys = {"training.steps": steps, "training.schedule.decay_steps": steps, **self._warmup(steps)}
            runs.append(self._run("run", self._of_budget(budget), {**base, **keys}, first))
        points = [
            point
            for run, (budget, steps) in zip(runs, lengths.items(), strict=True)
            for point in self._points(run, budget, steps, first)
        ]
        return runs, points

    def _branches(
        self, base: Overrides, lengths: Mapping[float, int], first: StudyRun | None
    ) -> tuple[list[StudyRun], list[Point]]:
        forks = {
            budget: steps - max(1, round(self.study.budgets.decay_share * steps)) for budget, steps in lengths.items()
        }
        warmup = self._warmup(min(lengths.values()))
        last = max(forks.values())
        keys = {
            **warmup,
            "training.steps": last,
            "training.schedule.decay_from": last,
            "training.schedule.decay_steps": last + 1,
            "training.checkpoint.at": sorted(forks.values()),
        }
        trunk = self._run("trunk", self._named(f"trunk-s{self.seed}"), {**base, **keys}, first)
        runs, points = [trunk], []
        for budget, steps in lengths.items():
            keys = {
                **warmup,
                "training.steps": steps,
                "training.start_from": str(folder_of(trunk.config.run_folder, forks[budget])),
                "training.schedule.decay_from": forks[budget],
                "training.schedule.decay_steps": steps,
            }
            run = self._run("run", self._of_budget(budget), {**base, **keys}, trunk)
            runs.append(run)
            points += self._points(run, budget, steps, first, trunk)
        return runs, points

    def _checkpoints(
        self, base: Overrides, lengths: Mapping[float, int], first: StudyRun | None
    ) -> tuple[list[StudyRun], list[Point]]:
        last = max(lengths.values())
        keys = {"training.steps": last, "training.checkpoint.at": sorted(lengths.values()), **self._warmup(last)}
        run = self._run("run", self._named(f"s{self.seed}"), {**base, **keys}, first)
        return [run], [point for each, steps in lengths.items() for point in self._points(run, each, steps, first)]

    def _warmup(self, steps: int) -> Overrides:
        share = self.study.budgets.warmup_share
        return {} if share is None else {"training.schedule.warmup_steps": round(share * steps)}

    def _named(self, end: str, settings: Mapping[str, str] | None = None) -> str:
        chosen = self.settings if settings is None else settings
        words = [self.arm, self.size, *(f"{axis}{label}" for axis, label in chosen.items()), end]
        return _as_name("-".join(word for word in words if word))

    def _of_budget(self, budget: float) -> str:
        return self._named(f"{budget:.4g}-s{self.seed}".replace("+", ""))

    def _run(self, role: Role, name: str, keys: Overrides, before: StudyRun | None) -> StudyRun:
        return StudyRun(name, role, self._load(name, keys), (before.name,) if before is not None else ())

    def _points(
        self, run: StudyRun, budget: float, steps: int, first: StudyRun | None, trunk: StudyRun | None = None
    ) -> list[Point]:
        """One, or one for each way of generating."""
        of_arm, axes = self.study.arms[self.arm], self.study.axes_of(self.arm, "generation")
        points = []
        for labels in _combinations(axes):
            generation = dict(of_arm.generation)
            for axis, label in labels.items():
                generation |= axes[axis].settings[label]
            name = self._named(f"{budget:.4g}-s{self.seed}".replace("+", ""), {**self.settings, **labels})
            measured_as = _as_name("-".join([f"step_{steps:08d}", *(f"{axis}{each}" for axis, each in labels.items())]))
            point = Point(
                name=name,
                arm=self.arm,
                size=self.size,
                settings={**self.settings, **labels},
                generation=generation,
                measured_as=measured_as,
                seed=self.seed,
                budget=budget,
                run=run.name,
                step=steps,
                stage_one=first.name if first is not None else None,
                trunk=trunk.name if trunk is not None else None,
            )
            points.append(point)
        return points

    def _load(self, name: str, keys: Overrides) -> RunConfig:
        keys = {**keys, "name": name, "runs_folder": str(self.folder / RUNS)}
        try:
            return load_config(
                self.study.arms[self.arm].config, [f"{key}={json.dumps(value)}" for key, value in keys.items()]
            )
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None

    @staticmethod
    def _twice(lengths: Mapping[float, int]) -> str:
        values = list(lengths.values())
        return str(next(steps for steps in values if values.count(steps) > 1))


def identity_of(config: RunConfig) -> dict[str, Any]:
    """What makes a run what it is: its config without where it lies."""
    tree = stored_tree(config)
    for key in PLACES:
        *sections, last = key.split(".")
        place: Any = tree
        for section in sections:
            place = place.get(section, {})
        place.pop(last, None)
    return tree


def _as_name(text: str) -> str:
    """What may be the name of a run."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text)
