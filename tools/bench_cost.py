"""Time and memory of a training step against everything that makes it larger, beside what they should grow by.

    python -m tools.bench_cost                                  Cola DLM, stage 2, on this machine
    python -m tools.bench_cost tiny-autoregressive              another family
    python -m tools.bench_cost --axes length,ranks --figure cost.png --json cost.json

One thing is varied at a time from a base of the preset's size. Time is that of the processor, over all ranks: other
programs do not change it. It should grow as the FLOPs of the step do (the column `hardware` of `cola plan`), memory as
`cola plan` says; both begin at a constant, so an axis fails where from one point to the next they grow by more than
`MARGIN` beyond that. Exit code 1 where one does.
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

from cola_megatron.config import RunConfig, load_config
from cola_megatron.config.load import preset_names
from cola_megatron.planning.flops import hardware_flops_by_step
from cola_megatron.planning.memory import RankMemory, rank_memory
from cola_megatron.planning.split import pipeline_split
from cola_megatron.reporting.figure_style import DOTS_PER_INCH, styled
from tools.bench_ranks import run_ranks

MARGIN = 1.15
"""Growth beyond theory that is noise: of a large matrix product the rate differs by a tenth between shapes."""
BASE = ["data.sequence_length=256", "training.micro_batch_size=4", "training.global_batch_size=4"]
BLOCK = "model.dit.block_size", "model.block_size"


@dataclass(frozen=True)
class Axis:
    """What is varied: the values, and the overrides of one of them."""

    title: str
    values: tuple[int, ...]
    keys: tuple[str, ...]
    """Each is set to the value."""
    families: tuple[str, ...] = ()
    """Empty: all."""


AXES = {
    "length": Axis("tokens of a sequence", (64, 128, 256, 512, 1024), ("data.sequence_length",)),
    "batch": Axis("sequences of a batch", (2, 4, 8, 16), ("training.micro_batch_size", "training.global_batch_size")),
    "layers": Axis("layers of the prior", (1, 2, 4, 8, 16), ("model.dit.num_layers",), ("cola",)),
    "depth": Axis(
        "layers of the transformer",
        (1, 2, 4, 8, 16),
        ("model.transformer.num_layers",),
        ("autoregressive", "masked_diffusion", "plaid"),
    ),
    "block": Axis("latents of a block", (4, 8, 16, 32, 64, 128), ("model.dit.block_size",), ("cola",)),
    "latent": Axis(
        "channels of a latent", (8, 16, 32, 64, 128), ("model.vae.latent_dim", "model.dit.latent_dim"), ("cola",)
    ),
    "ranks": Axis("data-parallel ranks", (1, 2, 4), ("training.global_batch_size",)),
}


@dataclass(frozen=True)
class Point:
    """One step."""

    axis: str
    value: int
    seconds: float
    """Of the processor, all ranks together; median of the steps."""
    flops: float
    """Of the step."""
    memory: float
    """Most bytes that steps add to those of model and engine, on the rank that needs most."""
    planned: float
    """The same as `cola plan` has it: activations, moments, what the update needs."""


def main(arguments: list[str] | None = None) -> None:
    """Prints a table; writes a figure where asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="tiny", choices=preset_names())
    parser.add_argument("--axes", type=lambda text: text.split(","), default=list(AXES), metavar="NAME,NAME")
    parser.add_argument("--steps", type=int, default=3, help="that are timed at each point (default 3)")
    parser.add_argument("--figure", type=Path, metavar="FILE.png")
    parser.add_argument("--json", type=Path, metavar="FILE")
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.axes) - set(AXES):
        parser.error(f"--axes: {', '.join(sorted(unknown))} is none of {', '.join(AXES)}")
    family = load_config(chosen.preset).model.family
    axes = [name for name in chosen.axes if not AXES[name].families or family in AXES[name].families]
    print(f"{'axis':<10}{'value':>7}{'cpu ms':>10}{'GFLOPs':>10}{'growth':>11}{'theory':>8}", end="")
    print(f"{'MiB':>9}{'plan':>9}{'growth':>8}{'theory':>8}")
    points, steep = [], []
    for axis in axes:
        of_axis: list[Point] = []
        for point in measure(chosen.preset, axis, chosen.steps):
            print(row(point, of_axis[-1] if of_axis else None), flush=True)
            steep += [] if not of_axis else too_steep(of_axis[-1], point)
            of_axis.append(point)
        points += of_axis
    if chosen.json is not None:
        chosen.json.write_text(json.dumps([asdict(point) for point in points], indent=1) + "\n")
    if chosen.figure is not None:
        figure(points).savefig(chosen.figure, dpi=DOTS_PER_INCH)
    for line in steep:
        print(f"grows faster than its theory: {line}")
    sys.exit(1 if steep else 0)


def config_at(preset: str, axis: str, value: int) -> RunConfig:
    """The config of a point."""
    count = 16 if axis == "ranks" else value
    micro = ["training.micro_batch_size=4"] if axis == "ranks" else []
    varied = [f"{key}={count}" for key in AXES[axis].keys]
    schedule = ["training.schedule.warmup_steps=0", "training.vae_update.from_scratch=true"]
    return load_config(preset, [*BASE, *(schedule if preset == "tiny" else schedule[:1]), *varied, *micro])


def measure(preset: str, axis: str, steps: int) -> Iterator[Point]:
    """The points of an axis in order."""
    for value in AXES[axis].values:
        config, ranks = config_at(preset, axis, value), value if axis == "ranks" else 1
        found = run_ranks(config, ranks, warm_up=1, steps=steps)
        plan = rank_memory(config, ranks, pipeline_split(config, ranks))
        yield Point(
            axis,
            value,
            seconds=sum(statistics.median(rank.processor_seconds) for rank in found),
            flops=hardware_flops_by_step(config)(1),
            memory=max(rank.peak_bytes for rank in found),
            planned=max(_of_steps(stage) for stage in plan),
        )


def _of_steps(stage: RankMemory) -> float:
    """What steps add to the memory of an engine that has not made one: activations, moments, what the update needs."""
    states = stage.states
    return stage.peak - states.weights - states.gradients - states.buffers


def row(point: Point, before: Point | None) -> str:
    """A line of the table."""
    least = f"{point.axis:<10}{point.value:>7}{point.seconds * 1e3:>10.0f}{point.flops / 1e9:>10.1f}"
    memory = f"{point.memory / 2**20:>9.0f}{point.planned / 2**20:>9.0f}"
    if before is None:
        return f"{least}{'':>19}{memory}"
    time, flops = point.seconds / before.seconds, point.flops / before.flops
    growth, planned = point.memory / before.memory, point.planned / before.planned
    return f"{least}{time:>11.2f}{flops:>8.2f}{memory}{growth:>8.2f}{planned:>8.2f}"


def too_steep(before: Point, point: Point) -> list[str]:
    """Where it grew by more than theory allows."""
    found = []
    for what, grown, theory in (
        ("time", point.seconds / before.seconds, point.flops / before.flops),
        ("memory", point.memory / before.memory, point.planned / before.planned),
    ):
        if grown > MARGIN * max(theory, 1.0):
            found.append(
                f"{what} from {before.value} to {point.value} {AXES[point.axis].title}: {grown:.2f} times, of which "
                f"{theory:.2f} were expected"
            )
    return found


@styled
def figure(points: Sequence[Point]) -> Figure:
    """A column for each axis: time above, memory below, each with its theory through the largest point."""
    axes = list(dict.fromkeys(point.axis for point in points))
    picture = Figure(figsize=(2.1 * len(axes), 4.8))
    grid = picture.subplots(2, len(axes), squeeze=False, sharey="row")
    for column, name in enumerate(axes):
        own = [point for point in points if point.axis == name]
        values = [point.value for point in own]
        panels = (
            ([1e3 * point.seconds for point in own], [point.flops for point in own], "processor ms of a step"),
            ([point.memory / 2**20 for point in own], [point.planned for point in own], "MiB of a rank"),
        )
        for line, (seen, theory, label) in enumerate(panels):
            panel = grid[line, column]
            scale = seen[-1] / theory[-1]
            panel.plot(values, [scale * each for each in theory], "--", color="#999999", label="theory")
            panel.plot(values, seen, "o-", color="#0072B2", label="measured")
            panel.set(xscale="log", yscale="log", xticks=values, xticklabels=[str(value) for value in values])
            panel.minorticks_off()
            if line == 1:
                panel.set_xlabel(AXES[name].title)
            if column == 0:
                panel.set_ylabel(label)
    grid[0, 0].legend(loc="upper left")
    return picture


if __name__ == "__main__":
    main()
