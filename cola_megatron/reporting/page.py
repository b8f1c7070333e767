"""`write_report`: one self-contained HTML page about a run, with figures and samples."""

from __future__ import annotations

from pathlib import Path

from cola_megatron.reporting.pictures import draw
from cola_megatron.reporting.report import Report
from cola_megatron.reporting.templates import page_environment

PAGE = "report.html"
FIGURES = "figures"
TEMPLATE = "page.html.j2"


def write_report(folder: Path, report: Report) -> Path:
    """Writes `folder/report.html`, which needs no other file, and each figure as `folder/figures/<name>.png`.

    A figure whose records are missing is left out, and the page says so. A reader finds the page whole at any time.

    Returns:
        The page's path.

    Raises:
        UserError: matplotlib is not installed.
    """
    drawn = draw(report)
    pictures = [each for each in drawn if each.name != "generated_latents"]
    latents = next((each for each in drawn if each.name == "generated_latents"), None)
    figures_folder = folder / FIGURES
    figures_folder.mkdir(parents=True, exist_ok=True)
    for picture in drawn:
        path = figures_folder / f"{picture.name}.png"
        if picture.png is None:
            path.unlink(missing_ok=True)  # of an earlier report
        else:
            path.write_bytes(picture.png)

    page = (
        page_environment()
        .get_template(TEMPLATE)
        .render(
            report=report,
            pictures=[picture for picture in pictures if picture.png is not None],
            left_out=[picture for picture in pictures if picture.png is None],
            latents=latents,
        )
    )
    path, unfinished = folder / PAGE, folder / f".{PAGE}.writing"
    unfinished.write_text(page, encoding="utf-8", newline="\n")
    unfinished.replace(path)
    return path
