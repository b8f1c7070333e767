"""The loss surface L(N, D) of a series under each definition of N, with its isoFLOP profiles and held-out check."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cola_megatron.scaling.isoflop import IsoFlopProfile, isoflop_profiles
from cola_megatron.scaling.loss_surface import FLOPS_PER_PARAMETER_AND_TOKEN, LossSurface, fit_loss_surface
from cola_megatron.scaling.points import LEAST_SIZES
from cola_megatron.scaling.prediction_check import Points, PredictionCheck, check_prediction
from cola_megatron.studies.report.curve_fits import groups_of
from cola_megatron.studies.report.series import Series, budget_steps
from cola_megatron.studies.rows import Results, Row


@dataclass(frozen=True)
class SurfaceFit:
    """L(N, D) of a series under one definition of N."""

    series: Series
    definition: str
    rows: tuple[Row, ...]
    surface: LossSurface | None
    cannot: str
    """Why there is no surface; empty where there is one."""
    profiles: tuple[IsoFlopProfile, ...]
    """At 6 N D of each of the study's budgets; empty where the surface has no optimum."""
    check: PredictionCheck | None
    no_check: str
    notes: tuple[str, ...]


def fit_surfaces(results: Results, series: Series, bootstrap: int = 400, seed: int = 0) -> tuple[SurfaceFit, ...]:
    """A surface for each definition of N; none for a series of one size. What cannot be fitted is said in words."""
    if len(series.sizes) < 2:
        return ()
    with_loss = [row for row in series.rows if results.loss in row.measures and row.tokens]
    definitions = dict.fromkeys(name for row in with_loss for name in row.parameters)
    return tuple(_surface(results, series, with_loss, each, bootstrap, seed) for each in definitions)


def _surface(
    results: Results, series: Series, with_loss: list[Row], definition: str, bootstrap: int, seed: int
) -> SurfaceFit:
    rows = tuple(row for row in with_loss if row.parameters.get(definition))
    N = [row.parameters[definition] for row in rows]
    D = [row.tokens or 0.0 for row in rows]
    losses = [row.measures[results.loss].value for row in rows]
    sizes = len({row.size for row in rows})
    if sizes < LEAST_SIZES:
        cannot = f"{sizes} sizes, and a surface needs at least {LEAST_SIZES}"
        return SurfaceFit(series, definition, rows, None, cannot, (), None, cannot, ())
    groups, note = groups_of(rows)
    notes = [note] if note else []
    try:
        surface = fit_loss_surface(N, D, losses, groups=groups, bootstrap=bootstrap, seed=seed)
    except ValueError as error:
        return SurfaceFit(series, definition, rows, None, str(error), (), None, str(error), ())
    if surface.at_bound:
        notes.append(f"the runs do not show {' or '.join(surface.at_bound)}")
    profiles: tuple[IsoFlopProfile, ...] = ()
    try:
        profiles = isoflop_profiles(surface, _budgets(results, rows, definition), _sizes(N))
    except ValueError as error:
        notes.append(f"no isoFLOP profile: {error}")
    check, no_check = None, ""
    largest = {row.point for row in budget_steps(results, rows)[-1][1]}
    held_out = np.array([row.point in largest for row in rows])
    known_groups, _ = groups_of([row for row in rows if row.point not in largest])
    try:
        # Groups of fewer than six are refused, and those of the held-out runs do not count.
        points = Points({definition: N}, D, losses, None, None if known_groups is None else groups)
        check = check_prediction(points, held_out, bootstrap=bootstrap, seed=seed)[definition]
    except ValueError as error:
        no_check = f"of the smaller budgets: {error}"
    return SurfaceFit(series, definition, rows, surface, "", profiles, check, no_check, tuple(notes))


def _budgets(results: Results, rows: tuple[Row, ...], definition: str) -> list[float]:
    """6 N D of each budget, the geometric mean of its runs."""
    found = []
    for _, of_budget in budget_steps(results, rows):
        logs = [np.log(row.parameters[definition] * (row.tokens or 1.0)) for row in of_budget]
        found.append(FLOPS_PER_PARAMETER_AND_TOKEN * float(np.exp(np.mean(logs))))
    return found


def _sizes(N: list[float]) -> np.ndarray:
    """Sizes of a profile: a little beyond those that were run."""
    return np.geomspace(min(N) / 1.5, max(N) * 1.5, 61)
