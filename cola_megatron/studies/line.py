"""One line of a study: an arm at one size, setting and seed, over all budgets."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from cola_megatron.checkpoint.folder import folder_of
from cola_megatron.config import ConfigError, RunConfig, load_config
from cola_megatron.planning.compute import compute_of, steps_for, tokens_of
from cola_megatron.scaling.rule import Rule
from cola_megatron.studies.runs import DATA, RUNS, STAGE_ONE, START_FROM, Point, Role, StudyRun
from cola_megatron.studies.study_file import AxisConfig, Overrides, StudyConfig

BUDGET_TOLERANCE = 0.01
"""By how much of its budget a run may miss it."""
OF_TRAINING = ("training", "both_stages")
"""Values of an axis' `varies` that make runs."""


class _Length(NamedTuple):
    """How long a run of a budget is, and its keys."""

    steps: int
    keys: Overrides


@dataclass(frozen=True)
class Expansion:
    """Of a line."""

    runs: list[StudyRun]
    points: list[Point]
    decisions: list[str]
    """What the study's rules set, and what they rounded, a line each."""


class StudyLine:
    """Configs of one line: the keys of the study, of the arm, of the size, of the settings, in that order."""

    def __init__(self, study: StudyConfig, folder: Path, arm: str, size: str, settings: dict[str, str], seed: int):
        self.study, self.folder, self.arm, self.size = study, folder, arm, size
        self.settings, self.seed = settings, seed
        self.decisions: list[str] = []

    def build(self, first: StudyRun | None) -> Expansion:
        """The runs after stage 1, and their points; raises ConfigError."""
        base = self._keys(self.settings)
        if first is not None:
            base[STAGE_ONE] = str(first.config.run_folder)
        lengths = self._lengths(base, first)
        steps = [length.steps for length in lengths.values()]
        if len(set(steps)) < len(steps):
            twice = next(each for each in steps if steps.count(each) > 1)
            raise ConfigError(f"{self.name}: two budgets are {twice} steps each; give others")
        kinds = {"own": self._own, "branches": self._branches, "checkpoints": self._checkpoints}
        runs, points = kinds[self.study.budgets.runs](lengths, first)
        return Expansion(runs, points, self.decisions)

    def _lengths(self, base: Overrides, first: StudyRun | None) -> dict[float, _Length]:
        """Of each budget, the smallest first; runs that share a trunk follow the rules for the largest."""
        amounts = sorted(self.study.budgets.amounts)
        if self.study.budgets.runs == "own":
            return {amount: self._ruled(base, first, amount) for amount in amounts}
        keys = self._ruled(base, first, amounts[-1]).keys
        config = self._load(self.name, keys)
        return {amount: _Length(self._steps(config, first, amount), keys) for amount in amounts}

    def _ruled(self, base: Overrides, first: StudyRun | None, amount: float) -> _Length:
        """The keys with those that the study's rules set for a run of this budget."""
        keys, config = base, self._load(self.name, base)
        if self.study.batch is not None:
            roughly = self._steps(config, first, amount, tolerance=1.0)
            keys = {**keys, **self._apply(self.study.batch, config, roughly, amount)}
            config = self._load(self.name, keys)
        steps = self._steps(config, first, amount)
        if self.study.learning_rate is not None:
            keys = {**keys, **self._apply(self.study.learning_rate, config, steps, amount)}
        return _Length(steps, keys)

    def _apply(self, rule: Rule, config: RunConfig, steps: int, amount: float) -> Overrides:
        try:
            decision = rule.decide(config, tokens_of(config, steps))
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from None
        self.decisions.append(f"{self.name}, budget {amount:.4g}: {decision.words}")
        return decision.overrides

    @property
    def name(self) -> str:
        """Of the line: the arm, its size and its settings."""
        return self._named("", self.settings)

    def _keys(self, settings: Mapping[str, str]) -> Overrides:
        study, of_arm = self.study, self.study.arms[self.arm]
        keys = {**study.overrides, **of_arm.overrides, **of_arm.sizes.get(self.size, {}), **self._set_by(settings)}
        data = study.data.path or str(self.folder / DATA)
        return {**keys, "seed": self.seed, "data.path": data, "training.log.wandb_group": study.name}

    def _set_by(self, settings: Mapping[str, str]) -> Overrides:
        """The keys of these labels of axes, in their order."""
        keys: Overrides = {}
        for axis, label in settings.items():
            keys |= self.study.axes[axis].settings[label]
        return keys

    def stage_one(self) -> StudyRun | None:
        """None: the arm has none, or this setting says itself what it starts from."""
        own, axes = self.study.arms[self.arm].stage_one, self.study.axes_of(self.arm, "both_stages")
        if own is None or STAGE_ONE in self._keys(self.settings):
            return None
        settings = {axis: label for axis, label in self.settings.items() if axis in axes}
        name = self._named(f"stage1-s{self.seed}", settings)
        return StudyRun(name, "stage_one", self._load(name, {**self._keys(settings), **own, "stage": 1}))

    def _steps(
        self, config: RunConfig, first: StudyRun | None, amount: float, tolerance: float = BUDGET_TOLERANCE
    ) -> int:
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
            return steps_for(config, column, left, tolerance)
        except ConfigError as error:
            raise ConfigError(f"{self.name}, budget {amount:.3g}: {error}") from None

    def _own(self, lengths: Mapping[float, _Length], first: StudyRun | None) -> tuple[list[StudyRun], list[Point]]:
        runs, points = [], []
        for budget, (steps, base) in lengths.items():
            keys = {"training.steps": steps, "training.schedule.decay_steps": steps, **self._warmup(steps)}
            run = self._run("run", self._of_budget(budget), {**base, **keys}, first)
            runs.append(run)
            points += self._points(run, budget, steps, first)
        return runs, points

    def _branches(self, lengths: Mapping[float, _Length], first: StudyRun | None) -> tuple[list[StudyRun], list[Point]]:
        share = self.study.budgets.decay_share
        forks = {budget: steps - max(1, round(share * steps)) for budget, (steps, _) in lengths.items()}
        warmup, last = self._warmup(min(steps for steps, _ in lengths.values())), max(forks.values())
        (_, base), *_ = lengths.values()
        constant = {
            **warmup,
            "training.steps": last,
            "training.schedule.decay_from": last,
            "training.schedule.decay_steps": last,
            "training.checkpoint.at": sorted(forks.values()),
        }
        trunk = self._run("trunk", self._named(f"trunk-s{self.seed}"), {**base, **constant}, first)
        runs, points = [trunk], []
        for budget, (steps, _) in lengths.items():
            decaying = {
                **warmup,
                "training.steps": steps,
                START_FROM: str(folder_of(trunk.config.run_folder, forks[budget])),
                "training.schedule.decay_from": forks[budget],
                "training.schedule.decay_steps": steps,
            }
            run = self._run("run", self._of_budget(budget), {**base, **decaying}, trunk)
            runs.append(replace(run, begins_at=forks[budget]))
            points += self._points(run, budget, steps, first, trunk)
        return runs, points

    def _checkpoints(
        self, lengths: Mapping[float, _Length], first: StudyRun | None
    ) -> tuple[list[StudyRun], list[Point]]:
        last, base = max(lengths.values(), key=lambda length: length.steps)
        at = sorted(steps for steps, _ in lengths.values())
        keys = {"training.steps": last, "training.checkpoint.at": at, **self._warmup(last)}
        run = self._run("run", self._named(f"s{self.seed}"), {**base, **keys}, first)
        return [run], [
            point for budget, (steps, _) in lengths.items() for point in self._points(run, budget, steps, first)
        ]

    def _warmup(self, steps: int) -> Overrides:
        share = self.study.budgets.warmup_share
        return {} if share is None else {"training.schedule.warmup_steps": round(share * steps)}

    def _named(self, end: str, settings: Mapping[str, str] | None = None) -> str:
        chosen = self.settings if settings is None else settings
        words = [self.arm, self.size, *(f"{axis}{label}" for axis, label in chosen.items()), end]
        return _as_name("-".join(word for word in words if word))

    def _of_budget(self, budget: float, labels: Mapping[str, str] | None = None) -> str:
        return self._named(f"{budget:.4g}-s{self.seed}".replace("+", ""), {**self.settings, **(labels or {})})

    def _run(self, role: Role, name: str, keys: Overrides, before: StudyRun | None) -> StudyRun:
        try:
            config = self._load(name, keys)
        except ConfigError as error:
            if "warmup_steps=" in str(error) and self.study.budgets.warmup_share is None:
                raise ConfigError(f"{error}; budgets.warmup_share sets it for every length") from None
            raise
        return StudyRun(name, role, config, (before.name,) if before is not None else ())

    def _points(
        self, run: StudyRun, budget: float, steps: int, first: StudyRun | None, trunk: StudyRun | None = None
    ) -> list[Point]:
        """One, or one for each way of generating and each part of the items."""
        of_arm, study = self.study.arms[self.arm], self.study
        ways, parts = (combinations(study.axes_of(self.arm, kind)) for kind in ("generation", "items"))
        points = []
        for way, part in itertools.product(ways, parts):
            measured_as = _as_name("-".join([f"step_{steps:08d}", *(f"{axis}{each}" for axis, each in way.items())]))
            point = Point(
                name=self._of_budget(budget, {**way, **part}),
                arm=self.arm,
                size=self.size,
                settings={**self.settings, **way, **part},
                generation={**of_arm.generation, **self._set_by(way)},
                items=self._set_by(part),
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


def combinations(axes: Mapping[str, AxisConfig]) -> list[dict[str, str]]:
    """A label of every axis, in all ways; of no axis, one."""
    labels = ([(name, label) for label in axis.settings] for name, axis in axes.items())
    return [dict(chosen) for chosen in itertools.product(*labels)]


def _as_name(text: str) -> str:
    """What may be the name of a run."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text)
