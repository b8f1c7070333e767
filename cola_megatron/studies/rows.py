"""A study as collected: typed rows of its points, what was compared, and the rows as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cola_megatron.studies.words import flops, number

COLUMNS = ("nominal", "model", "hardware")
BUDGET_COLUMNS = (*COLUMNS, "tokens", "steps")
"""Of compute, in the order in which they are shown."""
FINISHED = "finished"


@dataclass(frozen=True)
class Measure:
    """A number that was measured on a point."""

    value: float
    error: float | None = None
    """Its standard error over held-out sequences or items; None: not known."""
    kind: str | None = None
    """Of a loss: `exact` or `bound` (an upper bound of it)."""
    items: int | None = None
    """Of a score: how many items of a task."""


@dataclass(frozen=True)
class Sample:
    """A held-out text that a point continued."""

    prompt: str
    continuation: str
    original: str


@dataclass(frozen=True)
class Row:
    """A point of the study: a run at a step."""

    point: str
    run: str
    state: str
    """`finished`, `measured in part`, `damaged`, `running`, `stopped`, `failed` or `not begun`; of Slurm's runs also as
    Slurm calls it."""
    arm: str
    step: int | None = None
    error: str | None = None
    size: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    """Label on each axis of the study."""
    seed: int | None = None
    budget: float | None = None
    """FLOPs, in the study's budget column."""
    stage_one: str | None = None
    trunk: str | None = None
    parameters: Mapping[str, float] = field(default_factory=dict)
    """N by definition."""
    tokens: float | None = None
    compute: Mapping[str, float] = field(default_factory=dict)
    """FLOPs by column, of stage 2 (or the only stage) up to the step, the trunk included."""
    stage_one_compute: Mapping[str, float] = field(default_factory=dict)
    """FLOPs by column of the stage 1 that the point stands on, which other points share."""
    seconds: float | None = None
    devices: int | None = None
    device: str | None = None
    device_hours: float | None = None
    mfu: float | None = None
    measures: Mapping[str, Measure] = field(default_factory=dict)
    curve: tuple[tuple[int, str, float], ...] = ()
    """(step, name, value) of the held-out measurements during training."""
    samples: tuple[Sample, ...] = ()

    def charged(self, column: str) -> float | None:
        """FLOPs that the point has cost, stage 1 with it; the paper's nominal column leaves stage 1 out."""
        own = self.compute.get(column)
        if own is None or own <= 0:
            return None
        return own + (0.0 if column == "nominal" else self.stage_one_compute.get(column, 0.0))

    @property
    def group(self) -> str:
        """Points that were trained together, as branches of a trunk or checkpoints of a run, have one."""
        return self.trunk or self.run


@dataclass(frozen=True)
class Arm:
    """What is compared."""

    name: str
    title: str
    family: str = ""


@dataclass(frozen=True)
class Axis:
    """A config key that the study varies."""

    name: str
    title: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Published:
    """A published number, on the column that it was published on."""

    arm: str
    column: str
    compute: float | None
    """FLOPs; None: it was not said."""
    score: float | None = None
    loss: float | None = None
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Lost:
    """A point that no fit has, and why."""

    point: str
    why: str


@dataclass(frozen=True)
class Results:
    """A study as collected."""

    name: str
    title: str
    question: str
    scale: str
    budget_column: str
    loss: str
    """Measure that is fitted as a loss."""
    score: str | None
    """Measure that is fitted as a score; None: none."""
    chance: float
    """What a guess scores."""
    arms: Mapping[str, Arm]
    axes: Mapping[str, Axis]
    published: tuple[Published, ...]
    rows: tuple[Row, ...]
    lost: tuple[Lost, ...]
    spent: Mapping[str, float] = field(default_factory=dict)
    """Device-hours of all its runs, each once, by role: stage_one, trunk, run."""
    notes: tuple[str, ...] = ()
    """What a reader of the costs must know, in sentences."""

    def finished(self) -> tuple[Row, ...]:
        """Rows that fits and figures have: finished ones, in the study's order whatever the order of the file."""
        found = [row for row in self.rows if row.state == FINISHED and row.point not in self._lost_names]
        return tuple(sorted(found, key=self.order))

    def with_measure(self, name: str) -> tuple[Row, ...]:
        """Finished rows on which a measure was taken."""
        return tuple(row for row in self.finished() if name in row.measures)

    def baselines(self, measure: str) -> dict[str, float]:
        """What counting reaches in a measure, by name: measures called after it that are one number in all rows."""
        found: dict[str, set[float]] = {}
        for row in self.finished():
            for name, each in row.measures.items():
                if name.startswith(f"{measure}_"):
                    found.setdefault(name.removeprefix(f"{measure}_"), set()).add(round(each.value, 9))
        return {name: values.pop() for name, values in found.items() if len(values) == 1}

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of compute that finished rows have, that of the budgets first, or model FLOPs."""
        found = [column for column in COLUMNS if any(row.charged(column) for row in self.finished())]
        first = self.budget_column if self.budget_column in COLUMNS else "model"
        return tuple(sorted(found, key=lambda column: column != first))

    @property
    def main_column(self) -> str:
        """The column by which budgets were given, else the first that finished rows have."""
        return (*self.columns, self.budget_column if self.budget_column in COLUMNS else "model")[0]

    @property
    def is_axis_study(self) -> bool:
        """Whether settings of one or more axes are compared."""
        return any(len(axis.labels) > 1 for axis in self.axes.values())

    def not_fitted(self) -> tuple[Lost, ...]:
        """Every point that no fit has: what collect left out, and what is not finished."""
        named = {each.point for each in self.lost}
        others = [
            Lost(row.point, row.state + (f": {row.error}" if row.error else ""))
            for row in self.rows
            if row.state != FINISHED and row.point not in named
        ]
        return (*self.lost, *others)

    def budget_in_words(self, budget: float) -> str:
        """With its unit, which is that of the column that budgets are given in."""
        return flops(budget) if self.budget_column in COLUMNS else f"{number(budget)} {self.budget_column}"

    def budget_of(self, row: Row) -> float:
        """The budget that a row was planned for, else what it cost in the budget column; 0 where neither is known."""
        return row.budget or row.charged(self.budget_column) or 0.0

    @property
    def _lost_names(self) -> frozenset[str]:
        return frozenset(each.point for each in self.lost)

    def order(self, row: Row) -> tuple:
        """Sorts rows: by arm, settings, budget, size and seed."""
        settings = tuple(
            axis.labels.index(row.settings[name]) if row.settings.get(name) in axis.labels else len(axis.labels)
            for name, axis in self.axes.items()
        )
        seed = -1 if row.seed is None else row.seed
        return (*_place(row.arm, self.arms), settings, self.budget_of(row), row.size or "", seed, row.point)


def _place(name: str, among: Iterable[str]) -> tuple[int, str]:
    names = list(among)
    return (names.index(name) if name in names else len(names), name)


def table(results: Results) -> list[dict[str, Any]]:
    """Every row, finished or not, with all its columns under flat names; None where there is nothing."""
    measures = [results.loss, *([results.score] if results.score else [])]
    measures += sorted({name for row in results.rows for name in row.measures} - set(measures))
    definitions = list(dict.fromkeys(name for row in results.rows for name in row.parameters))
    found = []
    for row in sorted(results.rows, key=results.order):
        line: dict[str, Any] = {"point": row.point, "arm": row.arm, "state": row.state, "size": row.size}
        line |= {name: row.settings.get(name) for name in results.axes}
        line |= {"seed": row.seed, "budget": row.budget, "step": row.step, "tokens": row.tokens}
        line |= {f"parameters ({name})": row.parameters.get(name) for name in definitions}
        for column in COLUMNS:
            line[f"{column} FLOPs"] = row.compute.get(column)
            line[f"{column} FLOPs of stage 1"] = row.stage_one_compute.get(column)
        line |= {"seconds": row.seconds, "devices": row.devices, "device": row.device}
        line |= {"device_hours": row.device_hours, "mfu": row.mfu}
        for name in measures:
            measure = row.measures.get(name)
            line[name] = None if measure is None else measure.value
            line[f"{name}_error"] = None if measure is None else measure.error
        kind = row.measures.get(results.loss)
        line |= {"loss_kind": None if kind is None else kind.kind, "error": row.error}
        found.append(line)
    return found
