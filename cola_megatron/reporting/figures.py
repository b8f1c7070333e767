"""The pictures of training, one function each: records of a run in, a matplotlib Figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from cola_megatron.reporting.curves import (
    CONSTANT_PREDICTOR,
    FLOW_MATCHING,
    KL,
    MASK,
    OTHER,
    RECONSTRUCTION,
    REFERENCE,
    Records,
    finish_loss_panel,
    held_out,
    legend_below,
    legend_of_all,
    panels_of,
    series,
    stage_panels,
    training,
)
from cola_megatron.reporting.figure_style import WIDTH_INCHES, styled

ACCURACY_AT = (
    # key, label, colour, line style, marker: from dark to light as the latent gets noisier
    ("reconstruction_accuracy", "t = 0 (clean latents)", "#003A5C", "-", "o"),
    ("reconstruction_accuracy_t250", "t = 250 of 1000", "#0072B2", "--", "s"),
    ("reconstruction_accuracy_t500", "t = 500 of 1000", "#56B4E9", ":", "^"),
)
TERMS = {
    # term of the loss: label, colour, line style
    "reconstruction": ("reconstruction", RECONSTRUCTION, "-"),
    "mask": ("masked tokens", MASK, "-."),
    "posterior": ("posterior", KL, "--"),
    "reference": ("reference", REFERENCE, "-"),
    "flow_matching": ("flow matching", FLOW_MATCHING, ":"),
}
GRADIENT_OF = (
    # key, label, colour, line style
    ("gradient_norm_vae", "VAE", RECONSTRUCTION, "--"),
    ("gradient_norm_dit", "DiT", FLOW_MATCHING, ":"),
)


@styled
def stage_one_losses(records: Records) -> Figure:
    """Reconstruction and mask loss of stage 1 in one panel, the KL to the standard normal in another.

    Raises:
        NothingToPlot: no training records.
    """
    has_kl = bool(series(records, "train", "posterior")[0].size)
    figure, panels = panels_of(records, "stage 1", 1 + has_kl)
    panels[0].set_title("Reconstruction")
    training(panels[0], records, "reconstruction", "reconstruction", RECONSTRUCTION, "-")
    training(panels[0], records, "mask", "masked tokens", MASK, "-.")
    held_out(panels[0], records, "reconstruction_nll", "reconstruction, held-out", RECONSTRUCTION)
    finish_loss_panel(panels[0], "Loss [nats per token]")
    if has_kl:
        panels[1].set_title("KL to the standard normal")
        training(panels[1], records, "posterior", "KL", KL, "-")
        finish_loss_panel(panels[1], "KL [nats per token]", legend=False)
    return figure


@styled
def stage_two_losses(records: Records) -> Figure:
    """Flow-matching loss of stage 2 beside the constant predictor's, and the reconstruction loss.

    Raises:
        NothingToPlot: no training records.
    """
    has_reconstruction = any(
        series(records, kind, key)[0].size
        for kind, key in (("train", "reconstruction"), ("evaluation", "reconstruction_nll"))
    )
    figure, panels = panels_of(records, "stage 2", 1 + has_reconstruction)
    panels[0].set_title("Flow matching")
    training(panels[0], records, "flow_matching", "training", FLOW_MATCHING, "-")
    # The training line is at the run's own distribution of t, and so are the marks beside it.
    held_out(panels[0], records, "flow_matching_loss_training_times", "held-out", FLOW_MATCHING)
    steps, losses = series(records, "evaluation", "constant_predictor_loss")
    if steps.size == 1:
        panels[0].axhline(losses[0], **CONSTANT_PREDICTOR)
    elif steps.size:
        panels[0].plot(steps, losses, **CONSTANT_PREDICTOR)
    panels[0].set_ylabel("Squared error per channel")
    legend_below(panels[0])
    if has_reconstruction:
        panels[1].set_title("Reconstruction")
        training(panels[1], records, "reconstruction", "training", RECONSTRUCTION, "-")
        held_out(panels[1], records, "reconstruction_nll", "held-out", RECONSTRUCTION)
        finish_loss_panel(panels[1], "Loss [nats per token]")
    return figure


@styled
def token_losses(records: Records) -> Figure:
    """The training loss of a family of tokens, and what it gives held-out text, both in nats per token.

    Raises:
        NothingToPlot: no training records.
    """
    figure, (axes,) = panels_of(records, "the run", 1)
    training(axes, records, "loss", "training", RECONSTRUCTION, "-")
    held_out(axes, records, "nats_per_token", "held-out", RECONSTRUCTION)
    finish_loss_panel(axes, "Nats per token")
    return figure


@styled
def reconstruction_accuracy(titles: Sequence[str], stage_one: Records, stage_two: Records) -> Figure:
    """Held-out share of tokens that the decoder gets right, from clean latents and from noisy ones.

    Raises:
        NothingToPlot: neither stage has measured it.
    """
    figure, panels = stage_panels(titles, stage_one, stage_two, "evaluation", "reconstruction_accuracy")
    for records, (axes,) in panels:
        for key, label, colour, line_style, marker in ACCURACY_AT:
            steps, values = series(records, "evaluation", key)
            if steps.size:
                axes.plot(steps, values, color=colour, linestyle=line_style, marker=marker, label=label)
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[0][1][0].set_ylabel("Tokens reconstructed")
    legend_of_all(figure, [axes for _, (axes,) in panels])
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
def vae_logsnr(titles: Sequence[str], stage_one: Records, stage_two: Records) -> Figure:
    """How far the posterior means stand above the posterior's own noise, on held-out text.

    Raises:
        NothingToPlot: neither stage has measured it (a deterministic encoder has no noise).
    """
    figure, panels = stage_panels(titles, stage_one, stage_two, "evaluation", "vae_logsnr")
    for records, (axes,) in panels:
        axes.plot(*series(records, "evaluation", "vae_logsnr"), color=KL, marker="o")
    panels[0][1][0].set_ylabel("VAE logSNR [nats]")
    return figure


@styled
def speed_and_learning_rate(titles: Sequence[str], stage_one: Records, stage_two: Records) -> Figure:
    """Tokens per second and the learning rate of both stages.

    Raises:
        NothingToPlot: neither stage has training records.
    """
    figure, panels = stage_panels(titles, stage_one, stage_two, "train", "tokens_per_second", "learning_rate")
    for records, (speed_axes, rate_axes) in panels:
        training(speed_axes, records, "tokens_per_second", "tokens per second", OTHER, "-")
        speed_axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        steps, rates = series(records, "train", "learning_rate")
        rate_axes.plot(steps, rates, color=OTHER, marker="." if steps.size == 1 else None)
        rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3), useMathText=True)
    for axes in panels[0][1]:
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])  # last, for it fixes the top of the whole row
    panels[0][1][0].set_ylabel("Tokens/s")
    panels[0][1][1].set_ylabel("Learning rate")
    return figure


@styled
def gradient_norm(titles: Sequence[str], stage_one: Records, stage_two: Records) -> Figure:
    """The norm of the gradient before clipping, on a logarithmic axis: the whole, and the part of each network.

    Raises:
        NothingToPlot: neither stage has training records with it.
    """
    figure, panels = stage_panels(titles, stage_one, stage_two, "train", "gradient_norm")
    for records, (axes,) in panels:
        training(axes, records, "gradient_norm", "all", OTHER, "-")
        parts = [part for part in GRADIENT_OF if series(records, "train", part[0])[0].size]
        if len(parts) > 1:  # the only network's gradient is the whole
            for key, label, colour, line_style in parts:
                training(axes, records, key, label, colour, line_style)
        values = series(records, "train", "gradient_norm")[1]
        if (values[np.isfinite(values)] > 0).any():
            axes.set_yscale("log", nonpositive="mask")  # a VAE that is left out of a step has 0
    panels[0][1][0].set_ylabel("Norm of the gradient")
    legend_of_all(figure, [axes for _, (axes,) in panels])
    return figure


@styled
def weighted_terms(
    titles: Sequence[str],
    stage_one: Records,
    stage_two: Records,
    weights_one: Mapping[str, float],
    weights_two: Mapping[str, float],
) -> Figure:
    """What each term adds to the loss: its weight times its value, in training; black: the loss.

    Raises:
        NothingToPlot: neither stage has training records with a loss.
    """
    figure, columns = stage_panels(titles, stage_one, stage_two, "train", "loss", shared=False)
    for records, (axes,) in columns:
        training(axes, records, "loss", "loss", "black", "-")
        for name, weight in (weights_one if records is stage_one else weights_two).items():
            label, colour, style = TERMS.get(name, (name.replace("_", " "), OTHER, "--"))
            weighted = [
                {**record, name: weight * record[name]}
                for record in records
                if isinstance(record.get(name), int | float)
            ]
            training(axes, weighted, name, f"{weight:g} x {label}", colour, style)
        axes.axhline(0, color="#999999", linewidth=0.8)
        legend_below(axes)
    columns[0][1][0].set_ylabel("Part of the loss")
    return figure
