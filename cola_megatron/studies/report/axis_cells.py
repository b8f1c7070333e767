"""A study of axes at one budget: each combination of settings, the best of them, and which others it beats."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from cola_megatron.scaling.loss_surface import Estimate
from cola_megatron.studies.report.curve_fits import Quantity
from cola_megatron.studies.report.seed_spread import Spread, difference, spread_of
from cola_megatron.studies.report.series import budget_steps, settings_in_words
from cola_megatron.studies.rows import Results, Row


@dataclass(frozen=True)
class Cell:
    """One combination of settings."""

    settings: Mapping[str, str]
    title: str
    rows: tuple[Row, ...]
    mean: Estimate
    """Over seeds, with its interval; without repeats anywhere that of the measurement alone, or NaN."""


@dataclass(frozen=True)
class AxisComparison:
    """All combinations of an arm at its largest budget."""

    arm: str
    quantity: Quantity
    measure: str
    budget: float
    size: str
    cells: tuple[Cell, ...]
    best: Cell
    against: tuple[tuple[Cell, Estimate | None], ...]
    """Each other cell, and its difference from the best (other less best; None: no spread is known)."""
    spread: Spread

    @property
    def beaten(self) -> tuple[Cell, ...]:
        """Cells whose difference from the best leaves out zero."""
        return tuple(cell for cell, value in self.against if value is not None and (value.low > 0 or value.high < 0))


def compare_axes(results: Results, arm: str, quantity: Quantity) -> AxisComparison | None:
    """The combinations at the largest budget that has as many as any; None where there are not two."""
    measure = results.loss if quantity == "loss" else results.score
    if not results.is_axis_study or measure is None:
        return None
    rows = [row for row in results.with_measure(measure) if row.arm == arm]
    best_count, chosen, budget, size = 1, {}, 0.0, ""
    for each_budget, of_budget in budget_steps(results, rows):
        by_size: dict[str, list[Row]] = defaultdict(list)
        for row in of_budget:
            by_size[row.size or ""].append(row)
        for each_size, of_size in by_size.items():
            cells: dict[tuple, list[Row]] = defaultdict(list)
            for row in of_size:
                cells[tuple(sorted(row.settings.items()))].append(row)
            if len(cells) >= max(best_count, 2):
                best_count, chosen, budget, size = len(cells), dict(cells), each_budget, each_size
    if not chosen:
        return None
    spread = spread_of(dict(chosen), measure)
    cells_of = tuple(
        Cell(dict(key), settings_in_words(results, dict(key)), tuple(each), spread.interval_of(each, measure))
        for key, each in chosen.items()
    )
    sign = 1 if quantity == "loss" else -1
    best = min(cells_of, key=lambda cell: sign * cell.mean.value)
    against = tuple(
        (cell, difference(cell.rows, best.rows, measure, spread, spread)) for cell in cells_of if cell is not best
    )
    return AxisComparison(arm, quantity, measure, budget, size, cells_of, best, against, spread)
