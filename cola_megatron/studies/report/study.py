"""A collected study in a notebook: its table, fits, figures and conclusions."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cola_megatron.studies.report import conclusions as sentences
from cola_megatron.studies.report.fits import StudyFits, fit_study
from cola_megatron.studies.results import read_results
from cola_megatron.studies.rows import Results, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Study:
    """The folder of a study, as `cola sweep collect` left it.

    Example: `Study("studies/rq4").conclusions()`

    Raises:
        UserError: there are no results, or they cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.results: Results = read_results(self.folder)

    @property
    def table(self) -> list[dict[str, Any]]:
        """Every point with all its columns, finished or not: `pandas.DataFrame(study.table)`."""
        return table(self.results)

    def fits(self) -> StudyFits:
        """All curves, surfaces, differences and ratios; made once."""
        return self._fits

    @cached_property
    def _fits(self) -> StudyFits:
        return fit_study(self.results)

    def conclusions(self) -> tuple[sentences.Conclusion, ...]:
        """Sentences that the intervals allow, and those that they do not (`is_shown`)."""
        return sentences.conclusions(self.results, self._fits)

    def figures(self) -> dict[str, Figure]:
        """The report's figures by name, those that there are; needs matplotlib."""
        from cola_megatron.studies.report.pictures import drawings

        chosen = drawings(self.results, self._fits)
        from cola_megatron.reporting.figure_style import NothingToPlot

        found = {}
        for each in chosen:
            try:
                found[each.name] = each.make()
            except NothingToPlot:
                continue
        return found

    def write_report(self) -> Path:
        """Writes report.html, figures, results.csv and fits.json into the folder; returns the page's path."""
        from cola_megatron.studies.report.page import write_report

        return write_report(self.folder, self.results, self._fits)
