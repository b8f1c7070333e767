"""`write_comparison`: one self-contained HTML page about several runs, with overlaid curves."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cola_megatron.errors import UserError
from cola_megatron.reporting import comparison
from cola_megatron.reporting.compared_runs import ComparedRun
from cola_megatron.reporting.templates import page_environment

if TYPE_CHECKING:
    from cola_megatron.reporting.compare_figures import Against

PAGE, FIGURES, PREFIX = "comparison.html", "figures", "compare_"
TEMPLATE = "comparison.html.j2"


@dataclass(frozen=True)
class _Picture:
    name: str
    title: str
    caption: str
    png: bytes

    @property
    def base64(self) -> str:
        return base64.b64encode(self.png).decode()


def write_comparison(folder: Path, runs: Sequence[ComparedRun], against: Against = "flops") -> Path:
    """Writes FOLDER/comparison.html, which needs no other file, and each figure as FOLDER/figures/compare_NAME.png.

    Figures there of an earlier comparison are replaced or removed.

    Args:
        against: the second axis of every figure, beside steps.

    Returns:
        The page's path.

    Raises:
        UserError: matplotlib is not installed.
    """
    pictures, left_out = _draw(runs, against)
    figures_folder = folder / FIGURES
    figures_folder.mkdir(parents=True, exist_ok=True)
    for path in figures_folder.glob(f"{PREFIX}*.png"):
        path.unlink()
    for picture in pictures:
        (figures_folder / f"{picture.name}.png").write_bytes(picture.png)
    differing = comparison.differences(runs)
    text = (
        page_environment()
        .get_template(TEMPLATE)
        .render(
            runs=runs,
            table=comparison.table(runs),
            notes=comparison.notes(runs),
            pictures=pictures,
            left_out=left_out,
            differences=[each for each in differing if not each.is_free],
            free_differences=[each for each in differing if each.is_free],
        )
    )
    path = folder / PAGE
    # Paths may hold bytes that are no UTF-8.
    path.write_text(text, encoding="utf-8", errors="replace", newline="\n")
    return path


def _draw(runs: Sequence[ComparedRun], against: Against) -> tuple[list[_Picture], list[tuple[str, str]]]:
    """The pictures, and (title, reason) of those that there are not."""
    try:
        from cola_megatron.reporting import figure_style
        from cola_megatron.reporting.compare_figures import CURVES, families_apart, overlaid, title_of
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise UserError("the page needs matplotlib: make setup EXTRAS=report, or give --no-page") from error
    pictures, left_out = [], []
    for curve, family in [(each, family) for each in CURVES for family in families_apart(runs, each)]:
        title = title_of(curve, family)
        try:
            figure = overlaid(runs, curve, against, family)
        except figure_style.NothingToPlot as missing:
            left_out.append((title, str(missing)))
            continue
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=figure_style.DOTS_PER_INCH, metadata={"Software": None})
        without = [
            run.label
            for run in runs
            if family in (None, run.config.model.family)
            and not any(record["kind"] == curve.kind and curve.key in record for record in run.records)
        ]
        missing_runs = f" Not in the records of {', '.join(without)}." if without else ""
        name = f"{PREFIX}{curve.key}{'' if family is None else f'_{family}'}"
        pictures.append(_Picture(name, title, f"{curve.caption}{missing_runs}", buffer.getvalue()))
    return pictures, left_out
