"""Time and memory of a step against the length of a sequence, on one rank and on ranks that share it.

    python -m tools.bench_context                                     the autoregressive model, on 1 and 2 ranks
    python -m tools.bench_context --preset small --only-rows          Cola DLM's stage 2 likewise, without the picture
    python -m tools.bench_context --lengths 512 4096 --ranks 1 2 4 model.transformer.num_layers=8

One sequence is a step. Ranks are real processes, as in tools/bench_parallel.py: with CUDA each has a GPU of its own,
without it they share the cores. Dotted are what theory says: FLOPs, of which attention's grow with the square of the
length, at the rate of each curve's longest sequence; and the activations of `cola plan`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure

from cola_megatron.config import ConfigError, RunConfig, load_config
from cola_megatron.families import family_of
from cola_megatron.planning.memory import rank_memory
from cola_megatron.planning.split import pipeline_split
from cola_megatron.reporting.figure_style import DOTS_PER_INCH, WIDTH_INCHES, styled
from tools.bench_ranks import run_ranks

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "context_parallel.png"
SIZE = (
    "model.vocab_size=4096",
    "training.global_batch_size=1",
    "training.micro_batch_size=1",
    "training.precision=fp32",
    "parallel.reduce_bucket_size=5000000",
)
GIB = 2**30


@dataclass(frozen=True)
class Point:
    """One length on one number of ranks."""

    length: int
    ranks: int
    seconds: float
    """Of a step, the median."""
    fastest: float
    peak_bytes: float
    """What the steps added to the memory of the fullest rank."""
    planned_bytes: float
    """Activations of a rank, as `cola plan` estimates them."""
    exchanged_bytes: float
    """Handed by a rank to the all-to-alls of a step."""
    flops: float
    """Of a step on all ranks together."""


def measure(config: RunConfig, ranks: int, warm_up: int, steps: int) -> Point:
    """One point, in a job of its own."""
    results = run_ranks(config, ranks, warm_up, steps)
    seconds = [max(each) for each in zip(*(result.seconds for result in results), strict=True)]
    (memory,) = rank_memory(config, 1, pipeline_split(config))
    return Point(
        config.data.sequence_length,
        ranks,
        statistics.median(seconds),
        min(seconds),
        max(result.peak_bytes for result in results),
        memory.activations,
        max(sum(sent.payload for sent in result.sent if sent.operation == "all-to-all") for result in results),
        sum(part.hardware_flops(config) for part in family_of(config).parts(config)),
    )


def rows(points: Sequence[Point]) -> Iterator[str]:
    """Rows of Markdown, each beside one rank at its length."""
    alone = {point.length: point for point in points if point.ranks == 1}
    yield "| positions | ranks | s a step | times one rank | GiB added by a step | times one | exchanged, MB |"
    yield "|---|---|---|---|---|---|---|"
    for point in sorted(points, key=lambda point: (point.length, point.ranks)):
        one = alone.get(point.length)
        ratios = (
            [f"{point.fastest / one.fastest:.2f}", f"{point.peak_bytes / one.peak_bytes:.2f}"] if one else ["-"] * 2
        )
        cells = [f"{point.length:,}", str(point.ranks), f"{point.fastest:.2f}", ratios[0]]
        cells += [f"{point.peak_bytes / GIB:.2f}", ratios[1], f"{point.exchanged_bytes / 1e6:.1f}"]
        yield f"| {' | '.join(cells)} |"


@styled
def draw(points: Sequence[Point]) -> Figure:
    """Time, and memory beside the plan's activations, against length; a line for each number of ranks."""
    figure = Figure(figsize=(WIDTH_INCHES, 3.0))
    time, memory = figure.subplots(1, 2)
    for color, ranks in zip(
        ("#1f5fa8", "#c0504d", "#4f8f4f", "#8064a2"), sorted({p.ranks for p in points}), strict=False
    ):
        own = sorted((point for point in points if point.ranks == ranks), key=lambda point: point.length)
        lengths, name = [point.length for point in own], "1 rank" if ranks == 1 else f"{ranks} ranks"
        time.loglog(lengths, [point.fastest for point in own], "o-", color=color, label=name)
        rate = own[-1].fastest / own[-1].flops
        time.loglog(lengths, [rate * point.flops for point in own], ":", color=color, linewidth=1)
        memory.loglog(lengths, [point.peak_bytes / GIB for point in own], "o-", color=color, label=name)
        memory.loglog(lengths, [point.planned_bytes / GIB for point in own], ":", color=color, linewidth=1)
    time.set(title="Time of a step", xlabel="positions", ylabel="s, fastest step")
    memory.set(title="Memory of the fullest rank", xlabel="positions", ylabel="GiB added by a step")
    for axes in (time, memory):
        lengths = sorted({point.length for point in points})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
    time.plot([], [], ":", color="#555555", linewidth=1, label="by FLOPs")
    (planned,) = memory.plot([], [], ":", color="#555555", linewidth=1)
    time.legend()
    memory.legend([planned], ["activations alone, planned"])  # the colours are those beside it
    return figure


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 done, 2 wrong use."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    points = []
    try:
        for length in options.lengths:
            for ranks in options.ranks:
                own = [f"data.sequence_length={length}", f"parallel.context_parallel_size={ranks}"]
                config = load_config(options.preset, [*SIZE, *options.overrides, *own])
                points.append(measure(config, ranks, options.warm_up, options.steps))
                print(f"bench_context: {length} positions on {ranks}: {points[-1].fastest:.2f} s", file=sys.stderr)
    except ConfigError as error:
        print(f"bench_context: {error}", file=sys.stderr)
        return 2
    print(json.dumps([asdict(point) for point in points], indent=1) if options.json else "\n".join(rows(points)))
    if not options.only_rows:
        draw(points).savefig(options.picture, dpi=DOTS_PER_INCH)
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_context", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    parser.add_argument("--preset", default="small-autoregressive", help="a preset or config file (%(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="default: %(default)s")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each point (%(default)s)")
    parser.add_argument("--warm-up", type=int, default=1, help="steps before them (%(default)s)")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="where the picture goes (docs/images)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="one JSON document on stdout")
    output.add_argument("--only-rows", action="store_true", help="no picture")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
