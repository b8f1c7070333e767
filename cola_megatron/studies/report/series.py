"""What has a curve of its own in a study: an arm under one combination of the axes' settings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from cola_megatron.scaling.prediction_check import SAME_BUDGET
from cola_megatron.studies.rows import Results, Row


@dataclass(frozen=True)
class Series:
    """An arm under one combination of settings, with its finished rows."""

    arm: str
    settings: Mapping[str, str]
    title: str
    rows: tuple[Row, ...]

    @property
    def sizes(self) -> tuple[str, ...]:
        """Names of the sizes, in the order of the rows."""
        return tuple(dict.fromkeys(row.size or "" for row in self.rows))


def series_of(results: Results) -> tuple[Series, ...]:
    """All series in the study's order."""
    found: dict[tuple, list[Row]] = defaultdict(list)
    for row in results.finished():
        found[row.arm, tuple(sorted(row.settings.items()))].append(row)
    arms = {arm for arm, _ in found}
    return tuple(
        Series(arm, dict(settings), _title(results, arm, dict(settings), len(arms)), tuple(rows))
        for (arm, settings), rows in found.items()
    )


def settings_in_words(results: Results, settings: Mapping[str, str]) -> str:
    """`loc 1, latent size 16`: the axes that vary."""
    varied = [name for name, axis in results.axes.items() if len(axis.labels) > 1 and name in settings]
    return ", ".join(f"{results.axes[name].title} {settings[name]}" for name in varied)


def _title(results: Results, arm: str, settings: Mapping[str, str], arms: int) -> str:
    words = settings_in_words(results, settings)
    if words and arms == 1:
        return words
    return f"{results.arms[arm].title}, {words}" if words else results.arms[arm].title


def budget_steps(results: Results, rows: Iterable[Row]) -> list[tuple[float, list[Row]]]:
    """Rows by budget, ascending; budgets within 5% of each other are one."""
    found: list[tuple[float, list[Row]]] = []
    for row in sorted(rows, key=lambda each: (results.budget_of(each), each.point)):
        budget = results.budget_of(row)
        if found and budget <= found[-1][0] * (1 + SAME_BUDGET):
            found[-1][1].append(row)
        else:
            found.append((budget, [row]))
    return found


def best_size_of_each_budget(results: Results, rows: Sequence[Row], measure: str) -> tuple[Row, ...]:
    """Of each budget the runs of the size with the lowest mean loss: what a curve over sizes goes through."""
    kept: list[Row] = []
    for _, of_budget in budget_steps(results, rows):
        by_size: dict[str, list[Row]] = defaultdict(list)
        for row in of_budget:
            by_size[row.size or ""].append(row)
        kept += min(by_size.values(), key=lambda each: fmean(row.measures[measure].value for row in each))
    return tuple(kept)
