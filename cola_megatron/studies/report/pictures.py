"""Which pictures the page of a study has, and what a reader should look for in each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cola_megatron.errors import UserError
from cola_megatron.reporting.pictures import Picture, png_of
from cola_megatron.studies.report.curve_fits import Quantity
from cola_megatron.studies.report.fits import QUANTITIES, StudyFits
from cola_megatron.studies.rows import Results
from cola_megatron.studies.words import flops, name, sentence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = "figures"
SECTIONS = ("compute", "axes", "isoflop", "residuals", "learning")


@dataclass(frozen=True)
class Drawing:
    """A picture that may be drawn."""

    section: str
    """Of `SECTIONS`."""
    name: str
    title: str
    caption: str
    make: Callable[[], Figure]


def drawings(results: Results, fits: StudyFits) -> list[Drawing]:
    """All pictures of a study in the page's order.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from cola_megatron.reporting.compare_figures import CURVES
        from cola_megatron.studies.report import axis_figures, fit_figures
        from cola_megatron.studies.report import figures as study_figures
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        raise UserError("figures need matplotlib: make setup EXTRAS=report") from error
    found = [
        Drawing(
            "compute",
            f"{quantity}_against_{column}",
            f"{_what(results, quantity)} against {column} FLOPs",
            _compute_caption(results, quantity, column),
            partial(study_figures.over_compute, results, fits, quantity, column),
        )
        for quantity in QUANTITIES
        for column in results.columns
        if quantity == "loss" or results.score is not None
    ]
    found += [
        Drawing(
            "axes",
            f"axes_{each.quantity}" if len(results.arms) == 1 else f"axes_{each.quantity}_{_file_name(each.arm)}",
            f"{_what(results, each.quantity)} by setting{_of_arm(results, each.arm)}",
            "Means over seeds with 95% intervals, the spread pooled over all settings; pale circles are seeds, the "
            "star is the best. Intervals that overlap little may still not show a difference: the table has them.",
            partial(axis_figures.over_axes, results, each),
        )
        for each in fits.axes
    ]
    found += [
        Drawing(
            "isoflop",
            f"isoflop_{_file_name(fit.series.title)}_{_file_name(fit.definition)}",
            f"IsoFLOP curves of {fit.series.title}, N {fit.definition}",
            "Cuts through the fitted surface with its 95% band; runs are moved along it to the exact 6 N D. Stars are "
            "the best size of each budget with the interval of that size, left out where it lies beyond the sizes that "
            "were run.",
            partial(fit_figures.isoflop, results, fit),
        )
        for fit in fits.surfaces
    ]
    found += [
        Drawing(
            "residuals",
            f"residuals_{quantity}",
            f"Residuals of {_what(results, quantity)}",
            "They should scatter around zero; a bend over compute or size says that the form does not hold there.",
            partial(fit_figures.residuals, results, fits, quantity),
        )
        for quantity in QUANTITIES
        if quantity == "loss" or results.score is not None
    ]
    measured = {key for row in results.finished() for _, key, _ in row.curve}
    found += [
        Drawing(
            "learning",
            f"learning_{curve.key}",
            f"Learning curves: {curve.title}",
            f"Held-out, every run, the end marked. {curve.caption}",
            partial(study_figures.learning_curves, results, fits, curve),
        )
        for curve in CURVES
        if curve.kind == "evaluation" and curve.key in measured
    ]
    return found


def draw(results: Results, fits: StudyFits) -> dict[str, list[Picture]]:
    """The pictures by section; those that cannot be drawn have the reason instead."""
    from cola_megatron.reporting.figure_style import DOTS_PER_INCH, NothingToPlot

    found: dict[str, list[Picture]] = {section: [] for section in SECTIONS}
    for each in drawings(results, fits):
        try:
            picture = Picture(each.name, sentence(each.title), each.caption, png_of(each.make(), DOTS_PER_INCH))
        except NothingToPlot as missing:
            picture = Picture(each.name, sentence(each.title), each.caption, None, str(missing))
        found[each.section].append(picture)
    return found


def write_figures(folder: Path, pictures: dict[str, list[Picture]]) -> list[Path]:
    """Writes each picture as FOLDER/figures/NAME.png, and removes those of an earlier report that are no more."""
    figures = folder / FIGURES
    figures.mkdir(parents=True, exist_ok=True)
    written = []
    for picture in _all(pictures):
        if picture.png is not None:
            path = figures / f"{picture.name}.png"
            path.write_bytes(picture.png)
            written.append(path)
    ours = re.compile(r"(loss|score)_against_\w+|axes_\w+|isoflop_\w+|residuals_\w+|learning_\w+")
    for path in figures.glob("*.png"):
        if path not in written and ours.fullmatch(path.stem):
            path.unlink()
    return written


def _all(pictures: dict[str, list[Picture]]) -> Iterator[Picture]:
    for section in SECTIONS:
        yield from pictures[section]


def _what(results: Results, quantity: Quantity) -> str:
    return name(results.loss if quantity == "loss" else results.score or "score")


def _of_arm(results: Results, arm: str) -> str:
    return f" of {results.arms[arm].title}" if len(results.arms) > 1 else ""


def _file_name(text: str) -> str:
    return re.sub(r"\W+", "_", text).strip("_").lower()


def _compute_caption(results: Results, quantity: Quantity, column: str) -> str:
    from cola_megatron.studies.report.figures import published_near

    said = ["Points are runs, lines fitted curves with their 95% bands."]
    if column != "nominal" and any(row.charged(column) != row.compute.get(column) for row in results.finished()):
        said.append("Open markers: the same run without the stage 1 that is charged to it.")
    kinds = {row.measures[results.loss].kind for row in results.with_measure(results.loss)}
    if quantity == "loss" and len(kinds) > 1:
        said.append("An upper bound above an exact loss does not say that the loss is.")
    near, far = published_near(results, quantity, column)
    if near:
        said.append("Stars are published.")
    if far:
        first = flops(min(compute for compute, _ in far))
        said.append(f"{len(far)} published points, from {first} on, lie beyond this picture and stand in a table.")
    return " ".join(said)
