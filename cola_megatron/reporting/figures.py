"""The pictures of reports, one function each: records of a run or measured figures in, a matplotlib Figure out.

A colour is a quantity everywhere; a line is training, a marker is held-out, black dashes are the constant predictor.
Line styles and markers differ as well, so that the pictures read in black and white. Nothing here uses pyplot: no
display, no global state.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from cola_megatron.reporting.curves import Records, logarithmic_where_wide, running_median
from cola_megatron.reporting.curves import series as _series
from cola_megatron.reporting.curves import step_axis as _step_axis
from cola_megatron.reporting.figure_style import WIDTH_INCHES, NothingToPlot, styled

RECONSTRUCTION, MASK, KL, FLOW_MATCHING, OTHER = "#0072B2", "#D55E00", "#00795A", "#882255", "#444444"
STAGES = ("Stage 1: Text VAE", "Stage 2: VAE and prior")
ACCURACY_AT = (
    # key, label, colour, line style, marker: from dark to light as the latent gets noisier
    ("reconstruction_accuracy", "t = 0 (clean latents)", "#003A5C", "-", "o"),
    ("reconstruction_accuracy_t250", "t = 250 of 1000", "#0072B2", "--", "s"),
    ("reconstruction_accuracy_t500", "t = 500 of 1000", "#56B4E9", ":", "^"),
)
LATENT_SAMPLES = 3
_CONSTANT_PREDICTOR: dict[str, Any] = {
    "color": "black",
    "linestyle": "--",
    "linewidth": 1.4,
    "label": "constant predictor",
}
_BIN = re.compile(r"flow_matching_loss_bin_(\d+)")
COMPARED = (
    # name of the metric, label, colour, line style
    ("flow_matching_loss_without_context", "block alone", "#D55E00", "-"),
    ("linear_predictor_loss", "linear denoiser", "#0072B2", "-."),
)


@styled
def stage_one_losses(records: Records) -> Figure:
    """Reconstruction and mask loss of stage 1 in one panel, the KL to the standard normal in another.

    Raises:
        NothingToPlot: no training records.
    """
    has_kl = bool(_series(records, "train", "posterior")[0].size)
    figure, panels = _panels(records, "stage 1", 1 + has_kl)
    panels[0].set_title("Reconstruction")
    _training(panels[0], records, "reconstruction", "reconstruction", RECONSTRUCTION, "-")
    _training(panels[0], records, "mask", "masked tokens", MASK, "-.")
    _held_out(panels[0], records, "reconstruction_nll", "reconstruction, held-out", RECONSTRUCTION)
    _finish_loss_panel(panels[0], "Loss [nats per token]")
    if has_kl:
        panels[1].set_title("KL to the standard normal")
        _training(panels[1], records, "posterior", "KL", KL, "-")
        _finish_loss_panel(panels[1], "KL [nats per token]", legend=False)
    return figure


@styled
def stage_two_losses(records: Records) -> Figure:
    """Flow-matching loss of stage 2 beside the constant predictor's, and the reconstruction loss.

    Raises:
        NothingToPlot: no training records.
    """
    has_reconstruction = any(
        _series(records, kind, key)[0].size
        for kind, key in (("train", "reconstruction"), ("evaluation", "reconstruction_nll"))
    )
    figure, panels = _panels(records, "stage 2", 1 + has_reconstruction)
    panels[0].set_title("Flow matching")
    _training(panels[0], records, "flow_matching", "training", FLOW_MATCHING, "-")
    # The training line is at the run's own distribution of t, and so are the marks beside it; records of versions that
    # measured no other have it as flow_matching_loss.
    own_times = "flow_matching_loss_training_times"
    is_measured = _series(records, "evaluation", own_times)[0].size > 0
    _held_out(panels[0], records, own_times if is_measured else "flow_matching_loss", "held-out", FLOW_MATCHING)
    steps, losses = _series(records, "evaluation", "constant_predictor_loss")
    if steps.size == 1:
        panels[0].axhline(losses[0], **_CONSTANT_PREDICTOR)
    elif steps.size:
        panels[0].plot(steps, losses, **_CONSTANT_PREDICTOR)
    panels[0].set_ylabel("Squared error per channel")
    _legend_below(panels[0])
    if has_reconstruction:
        panels[1].set_title("Reconstruction")
        _training(panels[1], records, "reconstruction", "training", RECONSTRUCTION, "-")
        _held_out(panels[1], records, "reconstruction_nll", "held-out", RECONSTRUCTION)
        _finish_loss_panel(panels[1], "Loss [nats per token]")
    return figure


@styled
def reconstruction_accuracy(stage_one: Records, stage_two: Records) -> Figure:
    """Held-out share of tokens that the decoder gets right, from clean latents and from noisy ones.

    Raises:
        NothingToPlot: neither stage has measured it.
    """
    figure, panels = _stage_panels(stage_one, stage_two, "evaluation", "reconstruction_accuracy")
    for records, (axes,) in panels:
        for key, label, colour, line_style, marker in ACCURACY_AT:
            steps, values = _series(records, "evaluation", key)
            if steps.size:
                axes.plot(steps, values, color=colour, linestyle=line_style, marker=marker, label=label)
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[0][1][0].set_ylabel("Tokens reconstructed")
    named = {str(line.get_label()): line for _, (axes,) in panels for line in axes.lines}
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=len(named))
    return figure


@styled
def robustness_curve(times: Sequence[float], accuracy: Sequence[float], cross_entropy: Sequence[float]) -> Figure:
    """What the decoder reads from latents noised to flow time t: share of tokens, and nats per token."""
    figure = Figure(figsize=(WIDTH_INCHES, 3.1))
    left, right = figure.subplots(1, 2)
    left.set_title("Accuracy")
    left.plot(times, accuracy, color=RECONSTRUCTION, marker="o")
    left.set_ylim(0, 1.03)
    left.yaxis.set_major_formatter(PercentFormatter(1.0))
    left.set_ylabel("Tokens reconstructed")
    right.set_title("Cross entropy")
    right.plot(times, cross_entropy, color=RECONSTRUCTION, linestyle="--", marker="s")
    right.set_ylabel("Nats per token")
    for axes in (left, right):
        axes.set_xlabel("Flow time t (0: data, 1: noise)")
    return figure


@styled
def flow_matching_by_time(records: Records) -> Figure:
    """Held-out flow-matching loss over equal bins of t, from the last measurement, beside what it must be held against.

    Bars: with context. Lines: every block alone, and the best linear denoiser of one latent, where they were measured.

    Raises:
        NothingToPlot: stage 2 has not measured it.
    """
    measured = [record for record in records if record["kind"] == "evaluation" and any(map(_BIN.fullmatch, record))]
    if not measured:
        raise NothingToPlot("stage 2 has no evaluation records with the loss per bin of t")
    last = measured[-1]
    # A bin that no draw fell into has no key: the number of bins is what all measurements together show.
    bins = 1 + max(int(match[1]) for record in measured for match in map(_BIN.fullmatch, record) if match)
    losses = [last.get(f"flow_matching_loss_bin_{index}", math.nan) for index in range(bins)]
    figure = Figure(figsize=(WIDTH_INCHES, 3.1))
    axes = figure.add_subplot()
    axes.set_title(f"Flow matching over time, step {last['step']:,}")
    left_edges = np.arange(bins) / bins
    axes.bar(left_edges, losses, 1 / bins, align="edge", color="#D9B8C9", edgecolor=FLOW_MATCHING, label="with context")
    highest = [*losses, last.get("constant_predictor_loss", 0.0)]
    for name, label, colour, style in COMPARED:
        compared = [last.get(f"{name}_bin_{index}", math.nan) for index in range(bins)]
        if not all(map(math.isnan, compared)):
            axes.stairs(compared, np.arange(bins + 1) / bins, color=colour, linestyle=style, linewidth=1.8, label=label)
            highest += compared
    if "constant_predictor_loss" in last:
        axes.axhline(last["constant_predictor_loss"], **_CONSTANT_PREDICTOR)
    axes.set_xlim(0, 1)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.set_xlabel("Flow time t (0: data, 1: noise)")
    axes.set_ylabel("Squared error per channel")
    axes.grid(visible=False, axis="x")
    # Room above the bars, or the legend would lie on them.
    tallest = max(loss for loss in highest if math.isfinite(loss))
    if tallest > 0:
        axes.set_ylim(0, 1.4 * tallest)
    axes.legend(loc="upper center", ncols=2)
    return figure


@styled
def vae_logsnr(stage_one: Records, stage_two: Records) -> Figure:
    """How far the posterior means stand above the posterior's own noise, on held-out text.

    Raises:
        NothingToPlot: neither stage has measured it (a deterministic encoder has no noise).
    """
    figure, panels = _stage_panels(stage_one, stage_two, "evaluation", "vae_logsnr")
    for records, (axes,) in panels:
        axes.plot(*_series(records, "evaluation", "vae_logsnr"), color=KL, marker="o")
    panels[0][1][0].set_ylabel("VAE logSNR [nats]")
    return figure


@styled
def speed_and_learning_rate(stage_one: Records, stage_two: Records) -> Figure:
    """Tokens per second and the learning rate of both stages.

    Raises:
        NothingToPlot: neither stage has training records.
    """
    figure, panels = _stage_panels(stage_one, stage_two, "train", "tokens_per_second", "learning_rate")
    for records, (speed_axes, rate_axes) in panels:
        _training(speed_axes, records, "tokens_per_second", "tokens per second", OTHER, "-")
        speed_axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        steps, rates = _series(records, "train", "learning_rate")
        rate_axes.plot(steps, rates, color=OTHER, marker="." if steps.size == 1 else None)
        rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3), useMathText=True)
    for axes in panels[0][1]:
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])  # last, for it fixes the top of the whole row
    panels[0][1][0].set_ylabel("Tokens/s")
    panels[0][1][1].set_ylabel("Learning rate")
    return figure


@styled
def generated_latents(latents: Sequence[torch.Tensor]) -> Figure:
    """Heat maps of the first generated latents, channels by positions, with the block boundaries marked.

    Args:
        latents: (blocks, block_size, d) of each sample.

    Raises:
        NothingToPlot: there are none.
    """
    shown = [sample.detach().float().cpu() for sample in latents[:LATENT_SAMPLES] if sample.numel()]
    if not shown:
        raise NothingToPlot("there are no samples with latents")
    values = torch.cat([sample.flatten() for sample in shown]).abs()
    finite = values[values.isfinite()].numpy()
    # A few extreme channels would leave the rest one colour: the scale ends at the 99.5th percentile.
    limit = float(np.quantile(finite, 0.995)) if finite.size else 1.0
    figure = Figure(figsize=(WIDTH_INCHES, 0.7 + 1.5 * len(shown)))
    panels = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for number, (sample, axes) in enumerate(zip(shown, panels, strict=True), 1):
        blocks, block_size, channels = sample.shape
        image = axes.imshow(
            sample.flatten(0, 1).t().numpy(),
            cmap="cividis",  # its lightness rises evenly: readable in grey
            vmin=-limit or None,
            vmax=limit or None,
            aspect="auto",
            interpolation="nearest",
            extent=(0, blocks * block_size, channels, 0),
        )
        for boundary in range(block_size, blocks * block_size, block_size):
            axes.axvline(boundary, color="white", linewidth=3.5)
            axes.axvline(boundary, color="black", linewidth=1.5)
        axes.set_title(f"Sample {number}")
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 4, 8, 10], integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_ylabel("Channel")
        axes.grid(visible=False)
    panels[-1].set_xlabel("Latent position (a vertical line begins a block)")
    figure.colorbar(image, ax=panels, label="Latent value", extend="both", aspect=12 * len(shown), pad=0.02)
    return figure


def _panels(records: Records, stage: str, count: int) -> tuple[Figure, Sequence[Axes]]:
    """Panels side by side over the steps of one stage."""
    if not any(record["kind"] == "train" for record in records):
        raise NothingToPlot(f"{stage} has no training records")
    figure = Figure(figsize=(WIDTH_INCHES, 3.7))
    panels = figure.subplots(1, count, squeeze=False)[0]
    for axes in panels:
        _step_axis(axes)
    return figure, panels


def _stage_panels(
    stage_one: Records, stage_two: Records, kind: str, *keys: str
) -> tuple[Figure, list[tuple[Records, list[Axes]]]]:
    """A column for each stage that has `keys[0]`, a row for each key: [(records, [axes of key 0, ...]), ...]."""
    stages = [
        (title, records)
        for title, records in zip(STAGES, (stage_one, stage_two), strict=True)
        if _series(records, kind, keys[0])[0].size
    ]
    if not stages:
        what = "training" if kind == "train" else "evaluation"
        raise NothingToPlot(f"neither stage has {what} records with {' or '.join(keys)}")
    figure = Figure(figsize=(WIDTH_INCHES, 3.1 if len(keys) == 1 else 4.4))
    grid = figure.subplots(len(keys), len(stages), sharex="col", sharey="row", squeeze=False)
    for (title, _), column in zip(stages, grid.T, strict=True):
        column[0].set_title(title)
        _step_axis(column[-1])
    return figure, [(records, list(column)) for (_, records), column in zip(stages, grid.T, strict=True)]


def _training(axes: Axes, records: Records, key: str, label: str, colour: str, line_style: str) -> None:
    """The values as recorded, pale, and their running median over them; nothing where the key is absent."""
    steps, values = _series(records, "train", key)
    if not steps.size:
        return
    median = running_median(values)
    if not np.array_equal(median, values, equal_nan=True):
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    axes.plot(steps, median, color=colour, linestyle=line_style, label=label, marker="." if steps.size == 1 else None)


def _held_out(axes: Axes, records: Records, key: str, label: str, colour: str) -> None:
    """Markers at the measurements; nothing where the key is absent."""
    steps, values = _series(records, "evaluation", key)
    if steps.size:
        axes.plot(steps, values, "o", color=colour, markerfacecolor="white", markeredgewidth=1.4, label=label)


def _finish_loss_panel(axes: Axes, label: str, legend: bool = True) -> None:
    """Label and legend; a logarithmic axis where the values span much."""
    logarithmic_where_wide(axes)
    axes.set_ylabel(label)
    if legend:
        _legend_below(axes)


def _legend_below(axes: Axes) -> None:
    """Where no curve can cross it."""
    axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.24), borderaxespad=0, handlelength=2.6)
