"""`cola sweep fit`, `plot` and `report`: what a collected study shows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from launchers.output import print_json

if TYPE_CHECKING:
    from cola_megatron.studies.report.fits import StudyFits
    from cola_megatron.studies.report.tables import Grid
    from cola_megatron.studies.rows import Results

FOLDER = typer.Argument(..., help="Folder of a study that `cola sweep collect` has collected; it may be half finished.")
JSON = typer.Option(False, "--json", help="JSON instead of words.")


def fit(study: Path = FOLDER, as_json: bool = JSON) -> None:
    """Fit a study: curves and surfaces with intervals, the largest budget predicted, arms against each other.

    Writes fits.json.

    Example: `cola sweep fit studies/rq4`
    """
    from cola_megatron.studies.report import fits_file

    results, fits = _fitted(study)
    path = fits_file.save_fits(study, results, fits)
    if as_json:
        print_json({**fits_file.as_json(results, fits), "file": str(path)})
        return
    _print_fits(fits)
    _print_conclusions(results, fits)
    print(f"\n{path}")


def plot(study: Path = FOLDER, as_json: bool = JSON) -> None:
    """Draw a study: loss and score against compute, axes, isoFLOP curves, residuals, learning curves.

    Example: `cola sweep plot studies/rq4`
    """
    from cola_megatron.studies.report.pictures import draw, write_figures

    results, fits = _fitted(study)
    pictures = draw(results, fits)
    written = write_figures(study, pictures)
    left_out = [picture for section in pictures.values() for picture in section if picture.png is None]
    if as_json:
        missing = [{"figure": picture.name, "why": picture.reason} for picture in left_out]
        print_json({"figures": [str(path) for path in written], "left_out": missing})
        return
    for path in written:
        print(path)
    for picture in left_out:
        print(f"left out: {picture.title}: {picture.reason}")


def report(study: Path = FOLDER, as_json: bool = JSON) -> None:
    """Write report.html about a study, with figures, results.csv and fits.json beside it.

    Example: `cola sweep report studies/rq4`
    """
    from cola_megatron.studies.report import tables as study_tables
    from cola_megatron.studies.report.conclusions import conclusions
    from cola_megatron.studies.report.page import write_report

    results, fits = _fitted(study)
    path = write_report(study, results, fits)
    if as_json:
        said = [{"text": each.text, "is_shown": each.is_shown} for each in conclusions(results, fits)]
        print_json({"page": str(path), "status": study_tables.status(results), "conclusions": said})
        return
    print(study_tables.status(results))
    print()
    _print_grid(study_tables.main_table(results))
    _print_conclusions(results, fits)
    print(f"\n{path}")


def _fitted(study: Path) -> tuple[Results, StudyFits]:
    from cola_megatron.studies.report.fits import fit_study
    from cola_megatron.studies.results import read_results

    results = read_results(study)
    return results, fit_study(results)


def _print_fits(fits: StudyFits) -> None:
    from cola_megatron.studies.report.fit_tables import differences_table, fits_table, predictions_table

    for line in fits_table(fits).rows:
        series, quantity, against, _, numbers, *_ = line
        print(f"{series}, {quantity} against {against}: {numbers}")
    for table in (predictions_table(fits), differences_table(fits)):
        if table.rows:
            print(f"\n{table.caption}.")
            _print_grid(table)


def _print_grid(table: Grid) -> None:
    from cola_megatron.evaluation.results import format_table

    print(format_table([table.header, *table.rows]))


def _print_conclusions(results: Results, fits: StudyFits) -> None:
    from cola_megatron.studies.report.conclusions import conclusions

    said = conclusions(results, fits)
    for title, is_shown in (("shown", True), ("not shown", False)):
        chosen = [each.text for each in said if each.is_shown is is_shown]
        if chosen:
            print(f"\n{title}")
            for text in chosen:
                print(f"  - {text}")
