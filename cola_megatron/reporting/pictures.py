"""Which pictures a page has, and what a reader should look for in each."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from cola_megatron.errors import UserError
from cola_megatron.reporting.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
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
        """For a page."""
        assert self.png is not None, "asked for where it was drawn"
        return base64.b64encode(self.png).decode()


def draw(report: Report) -> list[Picture]:
    """All pictures in the page's order, the latents last.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from cola_megatron.reporting import figures, latent_figures, prior_figures
        from cola_megatron.reporting.figure_style import DOTS_PER_INCH, NothingToPlot
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise UserError("the report needs matplotlib: make setup EXTRAS=report") from error

    first, second, titles = report.stage_one, report.stage_two, report.page.stages
    one, two = first.records, second.records
    latents = [sample.latents for sample in report.samples if sample.latents is not None]
    last = [{"kind": "evaluation", "step": report.measured_at, **report.measured}] if report.measured else []

    def picture(name: str, title: str, caption: str, make: Callable[[], Figure], absent: str = "") -> Picture:
        if absent or name not in report.page.pictures:
            return Picture(name, title, caption, None, absent)
        try:
            return Picture(name, title, caption, png_of(make(), DOTS_PER_INCH))
        except NothingToPlot as missing:
            return Picture(name, title, caption, None, str(missing))

    drawn = [
        picture(
            "token_losses",
            "Loss",
            "Held-out circles should fall with the training line; where they turn up, the model learns its corpus by "
            "heart.",
            partial(figures.token_losses, two),
        ),
        picture(
            "stage_one_losses",
            "Stage 1 losses",
            "Both losses on the left should fall with the held-out circles close to the training line, while the KL on "
            "the right, what the latents cost, may settle high, for its weight is small.",
            partial(figures.stage_one_losses, one),
            first.absent,
        ),
        picture(
            "stage_two_losses",
            "Stage 2 losses",
            "Flow matching, at the run's own times, should drop well below the dashed line, the loss of the best "
            "constant guess, while the reconstruction stays as low as stage 1 left it.",
            partial(figures.stage_two_losses, two),
            second.absent,
        ),
        picture(
            "prior_over_steps",
            "What the prior learns",
            "Held-out, all at the same equally spaced times: with context should fall below the linear denoiser, and "
            "the gap to a block alone is what the text before it tells. The band is a 95% interval.",
            partial(prior_figures.prior_over_steps, two),
            second.absent,
        ),
        picture(
            "flow_matching_by_time",
            "Flow matching over time",
            "Every bar should end below the dashed line, and the rightmost ones, where the prior sees almost pure "
            "noise, show how much it can tell from the blocks before.",
            partial(prior_figures.flow_matching_by_time, [*two, *last]),
            second.absent,
        ),
        picture(
            "weighted_terms",
            "What the loss is made of",
            "Each term of the training loss times its weight; they add up to the black line. A term that is far below "
            "the others hardly steers what is learned.",
            partial(figures.weighted_terms, titles, one, two, first.weights, second.weights),
        ),
        picture(
            "gradient_norm",
            "Gradient norm",
            "Before clipping, of all parameters and of each network: it should settle. The network with the larger "
            "part decides how much both are scaled down; spikes that the loss shares are bad batches or too high a "
            "learning rate.",
            partial(figures.gradient_norm, titles, one, two),
        ),
        picture(
            "reconstruction_accuracy",
            "Held-out reconstruction",
            "Clean latents (t = 0) should give back nearly every token, and the closer the noisy ones come to that, "
            "the more of the prior's error the decoder forgives.",
            partial(figures.reconstruction_accuracy, titles, one, two),
        ),
        picture(
            "vae_logsnr",
            "Signal in the latents",
            "The logSNR, log of mean \u00b5\u00b2 over mean \u03c3\u00b2 of the posterior, should stay well above 0, "
            "where noise would be as strong as signal.",
            partial(figures.vae_logsnr, titles, one, two),
        ),
        picture(
            "posterior_dimensions",
            "What each dimension of the latent holds",
            "Of the checkpoint: dimensions should share the power and the KL evenly, and no eigenvalue of the latents' "
            "covariance should drop to the posterior's noise; crosses mark directions that hold more noise than text.",
            partial(latent_figures.posterior_dimensions, report.measured),
        ),
        picture(
            "speed_and_learning_rate",
            "Speed and learning rate",
            "Tokens per second should be flat, for dips are other work on the machine, and the learning rate should "
            "warm up and decay as configured.",
            partial(figures.speed_and_learning_rate, titles, one, two),
        ),
        picture(
            "generated_latents",
            "Generated latents",
            f"The latents of the first {latent_figures.LATENT_SAMPLES} samples should differ from position to position "
            "and from sample to sample; equal columns or blocks would mean that the prior has collapsed.",
            partial(
                latent_figures.generated_latents,
                latents,
            ),
            "" if report.samples else report.samples_absent,
        ),
    ]
    # Of a single term the loss itself says everything.
    alone = max(len(first.weights), len(second.weights)) < 2
    left_out = {"weighted_terms"} if alone else set()
    return [each for each in drawn if each.name in report.page.pictures and each.name not in left_out]


def png_of(figure: Figure, dots_per_inch: int) -> bytes:
    """The same bytes for the same figure: no version or time inside. Nothing is cut off, as wide labels else may be."""
    buffer = io.BytesIO()
    figure.savefig(
        buffer, format="png", dpi=dots_per_inch, bbox_inches="tight", pad_inches=0.06, metadata={"Software": None}
    )
    return buffer.getvalue()
