"""`write_report`: one self-contained HTML page about a study, finished or not; figures and tables beside it."""

from __future__ import annotations

from pathlib import Path

from cola_megatron.records.json_files import write_whole
from cola_megatron.reporting.templates import page_environment
from cola_megatron.studies.report import fit_tables
from cola_megatron.studies.report import tables as study_tables
from cola_megatron.studies.report.conclusions import conclusions
from cola_megatron.studies.report.fits import StudyFits, fit_study
from cola_megatron.studies.report.fits_file import save_fits
from cola_megatron.studies.report.pictures import draw, write_figures
from cola_megatron.studies.report.samples import side_by_side
from cola_megatron.studies.results import read_results, write_table
from cola_megatron.studies.rows import Results
from cola_megatron.studies.words import flops, listed

PAGE = "report.html"
TEMPLATE = "study.html.j2"


def write_report(folder: Path, results: Results | None = None, fits: StudyFits | None = None) -> Path:
    """Writes FOLDER/report.html, which needs no other file, and figures/*.png, results.csv and fits.json beside it.

    Args:
        results: None: read from the folder.
        fits: None: made from the results.

    Returns:
        The page's path.

    Raises:
        UserError: the folder has no results that can be read; matplotlib is not installed.
    """
    results = results or read_results(folder)
    fits = fits or fit_study(results)
    pictures = draw(results, fits)
    write_figures(folder, pictures)
    write_table(folder, results)
    save_fits(folder, results, fits)
    said = conclusions(results, fits)
    page = (
        page_environment()
        .get_template(TEMPLATE)
        .render(
            results=results,
            status=study_tables.status(results),
            what=study_tables.what_was_run(results),
            shown=[each.text for each in said if each.is_shown],
            not_shown=[each.text for each in said if not each.is_shown],
            pictures=pictures,
            main=study_tables.main_table(results),
            differences=[fit_tables.differences_table(fits), fit_tables.ratios_table(fits)],
            axes=fit_tables.axes_table(results, fits),
            fits=[fit_tables.fits_table(fits), fit_tables.predictions_table(fits)],
            runs=study_tables.runs_table(results),
            cost=study_tables.cost_table(results),
            samples=side_by_side(results),
            lost=study_tables.lost_table(results),
            published=study_tables.published_table(results),
            flops=flops,
            listed=listed,
        )
    )
    path = folder / PAGE
    # Texts that a model wrote may hold what is no UTF-8.
    write_whole(path, page.encode("utf-8", errors="replace").decode("utf-8"))
    return path
