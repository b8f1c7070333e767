"""`write_report`: one self-contained HTML page about a run of both stages, with figures and samples."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cola_megatron.errors import UserError
from cola_megatron.records.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "report.html"
FIGURES = "figures"
TEMPLATE = "page.html.j2"

# Control characters as their visible pictures (U+2400 ...), and lone surrogates, which UTF-8 cannot hold, as U+FFFD.
# Newline and tab stay: the page keeps white space.
_VISIBLE = (
    {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
    | {0x7F: 0x2421}
    | dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD)
)


@dataclass(frozen=True)
class Sample:
    """One continuation of a held-out text."""

    prompt: str
    continuation: str
    truth: str
    """How the text really went on."""
    latents: torch.Tensor
    """(blocks, block_size, d)."""


@dataclass(frozen=True)
class Report:
    """What a report tells."""

    title: str
    table: list[tuple[str, str]]
    """The summary: (what, value)."""
    stage_one: Path
    """Run folder with a metrics.jsonl."""
    stage_two: Path
    samples: list[Sample]
    files: list[tuple[str, str]]
    """Where everything lies: (what, path)."""


@dataclass(frozen=True)
class _Picture:
    """A figure on the page."""

    name: str
    title: str
    caption: str
    """One sentence that says what to look for."""
    png: bytes | None
    """None: left out."""
    reason: str = ""
    """Why it was left out."""

    @property
    def base64(self) -> str:
        assert self.png is not None, "asked for where it was drawn"
        return base64.b64encode(self.png).decode()


def write_report(folder: Path, report: Report) -> Path:
    """Writes `folder/report.html`, which needs no other file, and each figure as `folder/figures/<name>.png`.

    A figure whose records are missing is left out, and the page says so.

    Returns:
        The page's path.

    Raises:
        UserError: a stage has no metrics.jsonl, or matplotlib is not installed.
    """
    pictures = _draw(report)
    figures_folder = folder / FIGURES
    figures_folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        path = figures_folder / f"{picture.name}.png"
        if picture.png is None:
            path.unlink(missing_ok=True)  # of an earlier report
        else:
            path.write_bytes(picture.png)

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": _visible, "unseen": _unseen}
    *pictures, latents = pictures
    page = environment.get_template(TEMPLATE).render(report=report, pictures=pictures, latents=latents)
    path = folder / PAGE
    path.write_text(page, encoding="utf-8", newline="\n")
    return path


def _draw(report: Report) -> list[_Picture]:
    """All pictures in the page's order, the latents last."""
    try:
        from cola_megatron.reporting import figures
        from cola_megatron.reporting.figure_style import DOTS_PER_INCH, NothingToPlot
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise UserError("the report needs matplotlib: make setup EXTRAS=report") from error

    stage_one, stage_two = (_read(stage) for stage in (report.stage_one, report.stage_two))

    def picture(name: str, title: str, caption: str, draw: Callable[[], Figure]) -> _Picture:
        try:
            return _Picture(name, title, caption, _png(draw(), DOTS_PER_INCH))
        except NothingToPlot as missing:
            return _Picture(name, title, caption, None, str(missing))

    return [
        picture(
            "stage_one_losses",
            "Stage 1 losses",
            "Both losses on the left should fall with the held-out circles close to the training line, while the KL on "
            "the right, what the latents cost, may settle high, for its weight is small.",
            partial(figures.stage_one_losses, stage_one),
        ),
        picture(
            "stage_two_losses",
            "Stage 2 losses",
            "Flow matching should drop well below the dashed line, the loss of the best constant guess, while the "
            "reconstruction stays as low as stage 1 left it.",
            partial(figures.stage_two_losses, stage_two),
        ),
        picture(
            "reconstruction_accuracy",
            "Held-out reconstruction",
            "Clean latents (t = 0) should give back nearly every token, and the closer the noisy ones come to that, "
            "the more of the prior's error the decoder forgives.",
            partial(figures.reconstruction_accuracy, stage_one, stage_two),
        ),
        picture(
            "flow_matching_by_time",
            "Flow matching over time",
            "Every bar should end below the dashed line, and the rightmost ones, where the prior sees almost pure "
            "noise, show how much it can tell from the blocks before.",
            partial(figures.flow_matching_by_time, stage_two),
        ),
        picture(
            "vae_logsnr",
            "Signal in the latents",
            "The logSNR, log of mean \u00b5\u00b2 over mean \u03c3\u00b2 of the posterior, should stay well above 0, "
            "where noise would be as strong as signal.",
            partial(figures.vae_logsnr, stage_one, stage_two),
        ),
        picture(
            "speed_and_learning_rate",
            "Speed and learning rate",
            "Tokens per second should be flat, for dips are other work on the machine, and the learning rate should "
            "warm up and decay as configured.",
            partial(figures.speed_and_learning_rate, stage_one, stage_two),
        ),
        picture(
            "generated_latents",
            "Generated latents",
            f"The latents of the first {figures.LATENT_SAMPLES} samples should differ from position to position and "
            "from sample to sample; equal columns or blocks would mean that the prior has collapsed.",
            partial(figures.generated_latents, [sample.latents for sample in report.samples]),
        ),
    ]


def _read(run_folder: Path) -> list[dict]:
    path = run_folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist: a report needs the run folders of both stages")
    return read_metrics(path)


def _png(figure: Figure, dots_per_inch: int) -> bytes:
    """The same bytes for the same figure: no version or time inside."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dots_per_inch, metadata={"Software": None})
    return buffer.getvalue()


def _visible(text: str) -> str:
    """Text that can stand in a page and be seen; escaping is left to the template."""
    return text.translate(_VISIBLE)


def _unseen(text: str) -> str:
    """Words for a text that shows nothing on a page, else ""."""
    if not text:
        return "(empty)"
    return "" if text.strip() else f"({len(text)} white-space characters)"
