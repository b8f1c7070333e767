"""The pictures of latents: those that were generated, and what each dimension of the encoder's holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cola_megatron.reporting.curves import FLOW_MATCHING, KL, RECONSTRUCTION
from cola_megatron.reporting.figure_style import WIDTH_INCHES, NothingToPlot, styled

LATENT_SAMPLES = 3


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


@styled
def posterior_dimensions(metrics: Mapping[str, float]) -> Figure:
    """Of each dimension the mean of mu^2 and of sigma^2, and its KL; of the covariance of z0 the eigenvalues.

    Args:
        metrics: what `families.cola.posterior_statistics.posterior_metrics` returns.

    Raises:
        NothingToPlot: they are not there.
    """
    mean_square, variance, kl, eigenvalue, signal = (
        _of_dimensions(metrics, name) for name in ("mean_square", "variance", "kl", "eigenvalue", "signal")
    )
    if not len(mean_square):
        raise NothingToPlot("the posterior was not measured: that takes a checkpoint and held-out data")
    figure = Figure(figsize=(WIDTH_INCHES, 3.4))
    power_axes, kl_axes, spectrum_axes = figure.subplots(1, 3)
    power_axes.set_title("Power")
    power_axes.plot(mean_square, "o", color=RECONSTRUCTION, label="mean of \u00b5\u00b2")
    if len(variance):
        power_axes.plot(variance, "s", color=FLOW_MATCHING, markerfacecolor="white", label="mean of \u03c3\u00b2")
    kl_axes.set_title("KL to N(0, 1) [nats]")
    if len(kl):
        kl_axes.bar(range(len(kl)), kl, color=KL)
    else:
        kl_axes.text(0.5, 0.5, "no variance", transform=kl_axes.transAxes, ha="center")
    spectrum_axes.set_title("Spectrum")
    spectrum_axes.plot(eigenvalue, "o", color=RECONSTRUCTION, label="eigenvalue")
    dead = [index for index, (all_, of_mean) in enumerate(zip(eigenvalue, signal, strict=True)) if 2 * of_mean < all_]
    if dead and len(variance):
        spectrum_axes.plot(
            dead,
            [eigenvalue[index] for index in dead],
            "x",
            color="#D55E00",
            markersize=9,
            markeredgewidth=2,
            label="dead",
        )
    for axes, label in ((power_axes, "Dimension"), (kl_axes, "Dimension"), (spectrum_axes, "Direction")):
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for axes in (power_axes, spectrum_axes):
        values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines])
        if (values > 0).any():
            axes.set_yscale("log")
        axes.legend(loc="upper left", bbox_to_anchor=(-0.1, -0.26), borderaxespad=0, handlelength=1.2)
    return figure


def _of_dimensions(metrics: Mapping[str, float], name: str) -> list[float]:
    found: list[float] = []
    while (key := f"posterior_{name}_{len(found)}") in metrics:
        found.append(metrics[key])
    return found
