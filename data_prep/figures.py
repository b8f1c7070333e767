"""The pictures of a prepared data set: what was removed by which rule, and how long the documents are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from cola_megatron.reporting.figure_style import DOTS_PER_INCH, WIDTH_INCHES, NothingToPlot, styled

__all__ = ["lengths", "removed", "write_figures"]

COLOURS = ("#0072B2", "#D55E00", "#00795A", "#882255", "#E69F00", "#56B4E9", "#444444")
PANEL_INCHES, BAR_INCHES = 2.6, 0.26


def write_figures(report: dict[str, Any], folder: Path) -> list[Path]:
    """Writes `lengths.png` and, where anything was removed, `removed.png`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for draw in (lengths, removed):
        try:
            figure = draw(report)
        except NothingToPlot:
            continue
        written.append(folder / f"{draw.__name__}.png")
        figure.savefig(written[-1], dpi=DOTS_PER_INCH, metadata={"Software": None})
    return written


@styled
def lengths(report: dict[str, Any]) -> Figure:
    """Share of each source's documents by their length in tokens, in powers of two.

    Raises:
        NothingToPlot: no document was tokenised.
    """
    sources = {name: source["lengths"] for name, source in report["sources"].items() if source["lengths"]}
    if not sources:
        raise NothingToPlot("no document was tokenised")
    figure = Figure(figsize=(WIDTH_INCHES, PANEL_INCHES))
    axes = figure.subplots()
    bins = sorted({int(low) for counts in sources.values() for low in counts})
    positions = {low: index for index, low in enumerate(range(bins[0].bit_length(), bins[-1].bit_length() + 1))}
    for index, (name, counts) in enumerate(sources.items()):
        total = sum(counts.values())
        lows = sorted(map(int, counts))
        axes.plot(
            [positions[low.bit_length()] for low in lows],
            [counts[str(low)] / total for low in lows],
            color=COLOURS[index % len(COLOURS)],
            marker="o",
            label=name,
        )
    axes.set_xticks(range(len(positions)), [f"{2 ** (power - 1):,}" for power in positions], rotation=45, ha="right")
    axes.set_xlabel("Tokens per document, from this to the next number")
    axes.set_ylabel("Documents")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


@styled
def removed(report: dict[str, Any]) -> Figure:
    """Share of each source's documents that each rule removed.

    Raises:
        NothingToPlot: nothing was removed.
    """
    sources = {name: source for name, source in report["sources"].items() if source["removed"]}
    if not sources:
        raise NothingToPlot("nothing was removed")
    rules = sorted({rule for source in sources.values() for rule in source["removed"]}, reverse=True)
    figure = Figure(figsize=(WIDTH_INCHES, 1.1 + BAR_INCHES * len(rules) * max(1, len(sources) / 2)))
    axes = figure.subplots()
    height = 0.8 / len(sources)
    for index, (name, source) in enumerate(sources.items()):
        shares = [source["removed"].get(rule, 0) / source["read"]["documents"] for rule in rules]
        places = [place + 0.4 - height * (index + 0.5) for place in range(len(rules))]
        axes.barh(places, shares, height, color=COLOURS[index % len(COLOURS)], label=name)
    axes.set_yticks(range(len(rules)), rules)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axes.set_xlabel("Documents read")
    axes.legend()
    return figure
