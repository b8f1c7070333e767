"""The tables of a study's page and of its commands: rows of words."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from cola_megatron.studies.report.series import budget_steps
from cola_megatron.studies.rows import FINISHED, Measure, Results, Row, table
from cola_megatron.studies.words import count, flops, listed, name, number, shortened

COLUMNS = {
    "nominal": "6 N D, the axis of the paper; it leaves stage 1 out",
    "model": "what the model computes: both copies, attention, VAE, head; stage 1 is charged",
    "hardware": "what the devices compute: model with recomputation; stage 1 is charged",
}
"""What each column of compute counts."""


@dataclass(frozen=True)
class Grid:
    """A table in words."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def what_was_run(results: Results) -> list[tuple[str, str]]:
    """Arms, budgets, sizes, axes, seeds and columns, each with its meaning in words."""
    rows = results.finished()
    found = [("arms", listed([f"{arm.title}{_family(arm.family)}" for arm in results.arms.values()]))]
    for axis in results.axes.values():
        found.append((axis.title, listed(axis.labels)))
    budgets = [number(budget) for budget, _ in budget_steps(results, results.rows) if budget]
    counted = f"FLOPs, counted in the column {results.budget_column}"
    found.append(
        ("budgets", f"{listed(budgets)} {counted if results.budget_column in COLUMNS else results.budget_column}")
    )
    seeds = sorted({row.seed for row in results.rows if row.seed is not None})
    found.append(("seeds", f"{len(seeds)} ({listed([str(seed) for seed in seeds])})"))
    sizes: dict[tuple[str, str], Row] = {}
    for row in rows:
        sizes.setdefault((results.arms[row.arm].title, row.size or ""), row)
    found += [
        (
            f"parameters of {arm}{f', {size}' if size else ''}",
            listed([f"{count(value)} {definition}" for definition, value in row.parameters.items()]),
        )
        for (arm, size), row in sizes.items()
        if row.parameters
    ]
    schedules = {("branches of a trunk" if row.trunk else "a run for every point") for row in rows}
    if any(len(of_run) > 1 for of_run in _by_run(rows).values()):
        schedules = {"checkpoints of one run"}
    if rows:
        found.append(("points", f"{len(rows)} of {len(results.rows)} finished; {listed(sorted(schedules))}"))
        found.append(("devices", listed(sorted({f"{row.devices or '?'} x {row.device or 'unknown'}" for row in rows}))))
    found += [(f"{column} FLOPs", COLUMNS[column]) for column in results.columns]
    return found


def _family(family: str) -> str:
    return f" ({name(family)})" if family else ""


def _by_run(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.run].append(row)
    return found


def main_table(results: Results) -> Grid:
    """Each series at each budget: mean over seeds of compute, loss and score. What a command prints."""
    measures = [results.loss, *([results.score] if results.score else [])]
    column = results.main_column
    axes = [axis for axis in results.axes.values() if len(axis.labels) > 1]
    header = ("arm", *(axis.title for axis in axes), "size", "budget", f"{column} FLOPs", "seeds", *map(name, measures))
    budgets = {row.point: budget for budget, rows in budget_steps(results, results.finished()) for row in rows}
    cells: dict[tuple, list[Row]] = {}
    for row in results.finished():
        settings = tuple(row.settings.get(axis.name, "-") for axis in axes)
        cells.setdefault((row.arm, settings, row.size or "-", budgets[row.point]), []).append(row)
    lines = []
    for (arm, settings, size, budget), rows in cells.items():
        costs = [cost for row in rows if (cost := row.charged(column))]
        lines.append(
            (
                results.arms[arm].title,
                *settings,
                size,
                number(budget),
                number(fmean(costs)) if costs else "-",
                str(len({row.seed for row in rows})),
                *(_mean([row.measures[each] for row in rows if each in row.measures]) for each in measures),
            )
        )
    return Grid("Means over seeds; \u00b1 is half of the range over seeds", header, tuple(lines))


def _mean(measures: Sequence[Measure]) -> str:
    if not measures:
        return "-"
    values = [each.value for each in measures]
    half = (max(values) - min(values)) / 2
    bound = " (bound)" if any(each.kind == "bound" for each in measures) else ""
    around = f" \u00b1 {number(half, 2)}" if len(values) > 1 else ""
    return f"{number(fmean(values), 4)}{around}{bound}"


def runs_table(results: Results) -> Grid:
    """Every point with all its columns."""
    lines = table(results)
    header = tuple(key for key in (lines[0] if lines else {}) if any(line[key] not in (None, "") for line in lines))
    return Grid(
        "Every point; FLOPs are of the run, those of stage 1 beside them",
        tuple(map(name, header)),
        tuple(tuple(_cell(key, line[key]) for key in header) for line in lines),
    )


def _cell(key: str, value: object) -> str:
    if value is None or value == "":
        return "-"
    if key == "seed" or key == "step":
        return str(value)
    return number(float(value), 4) if isinstance(value, int | float) else str(value)


def cost_table(results: Results) -> Grid:
    """What each arm's points cost at each budget: stage 1 apart and charged, device-hours, utilisation."""
    column = results.main_column
    lines = []
    for arm, budget, rows in _by_arm_and_budget(results):
        own = [row.compute[column] for row in rows if row.compute.get(column)]
        stage_one = [row.stage_one_compute.get(column, 0.0) for row in rows]
        total = [cost for row in rows if (cost := row.charged(column))]
        hours = [row.device_hours for row in rows if row.device_hours is not None]
        mfu = [row.mfu for row in rows if row.mfu is not None]
        shares = {row.stage_one for row in rows if row.stage_one}
        lines.append(
            (
                results.arms[arm].title,
                number(budget),
                str(len(rows)),
                number(fmean(own)) if own else "-",
                f"{number(fmean(stage_one))} ({len(shares)} shared)" if shares else "none",
                number(fmean(total)) if total else "-",
                f"{100 * fmean(stage_one) / fmean(total):.0f}%" if shares and total else "-",
                number(fmean(hours)) if hours else "-",
                f"{100 * fmean(mfu):.1f}%" if mfu else "-",
            )
        )
    caption = (
        f"Means over the points of a budget, {column} FLOPs. Stage 1 is trained once for each seed, shared by the "
        "points of that seed, and charged to each of them in full, as each would need it. Device-hours are those of "
        f"the run to its point, its trunk's included; the study took {_hours(results)}"
    )
    header = ("arm", "budget", "points", "own FLOPs", "stage 1", "charged", "stage 1 of it", "device-hours", "MFU")
    return Grid(caption, header, tuple(lines))


def _by_arm_and_budget(results: Results) -> Iterator[tuple[str, float, list[Row]]]:
    for arm in results.arms:
        for budget, rows in budget_steps(results, [row for row in results.finished() if row.arm == arm]):
            yield arm, budget, rows


def _hours(results: Results) -> str:
    """Of every run of the study once, by what it was."""
    words = {"stage_one": "stage 1", "trunk": "trunks", "run": "runs"}
    parts = [f"{number(results.spent[role])} in {word}" for role, word in words.items() if results.spent.get(role)]
    return f"{number(sum(results.spent.values()))} in all" + (f": {listed(parts)}" if len(parts) > 1 else "")


def published_table(results: Results) -> Grid:
    """Published numbers beside ours of the same arm at the nearest compute; at our largest where theirs is not said."""
    lines = []
    for each in results.published:
        kind, value = ("score", each.score) if each.score is not None else ("loss", each.loss)
        measure = results.score if kind == "score" else results.loss
        rows = [
            row
            for row in results.finished()
            if row.arm == each.arm
            and measure in row.measures
            and row.charged(each.column)
            and all(row.settings.get(key) == label for key, label in each.settings.items())
        ]
        ours = "none"
        if rows and measure:
            costs = [row.charged(each.column) or 1.0 for row in rows]
            wanted = each.compute or max(costs)
            cost, nearest = min(zip(costs, rows, strict=True), key=lambda pair: abs(math.log(pair[0] / wanted)))
            ours = f"{number(nearest.measures[measure].value)} ({name(measure)}) at {flops(cost)}"
        arm = results.arms[each.arm].title if each.arm in results.arms else each.arm
        settings = ", ".join(f"{key} {label}" for key, label in each.settings.items())
        at = f"{number(each.compute)} ({each.column})" if each.compute is not None else "not said"
        lines.append((f"{arm}{f', {settings}' if settings else ''}", at, kind, number(value), ours))
    header = ("published", "at FLOPs", "of", "value", "ours at the nearest compute")
    return Grid(
        "Published numbers; theirs and ours compare only where data, task and compute are alike", header, tuple(lines)
    )


def lost_table(results: Results) -> Grid:
    """Every point that no fit has, and why."""
    return Grid("", ("point", "why"), tuple((each.point, each.why) for each in results.not_fitted()))


def status(results: Results) -> str:
    """How far the study is, in a line."""
    states: dict[str, int] = defaultdict(int)
    for row in results.rows:
        states[row.state] += 1
    finished = len(results.finished())
    others = [f"{found} {state}" for state, found in states.items() if state != FINISHED]
    scale = f" at scale {results.scale}" if results.scale else ""
    rest = f"; {shortened(others)}" if others else ""
    return f"Study {results.name}{scale}: {finished} of {len(results.rows)} points are in the fits{rest}."
