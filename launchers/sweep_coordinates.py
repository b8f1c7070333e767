"""`cola sweep coordinates`: whether activations keep their size over widths and depths, so that rates transfer."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from launchers.output import print_json

if TYPE_CHECKING:
    from cola_megatron.scaling.coordinates import CoordinateCheck, Slope


def coordinates(
    source: str = typer.Argument(..., help="A preset (tiny, tiny-autoregressive, ...) or a YAML file."),
    overrides: list[str] = typer.Argument(None, help="section.key=value; batches are those of data.path, if given."),
    parametrization: Literal["completep", "mup", "standard", "config"] = typer.Option(
        "completep", help="What is checked, with the config's own sizes as the base; config: as the config has it."
    ),
    widths: str = typer.Option(None, help="Widths of the main network; by default its own, twice and four times it."),
    depths: str = typer.Option(None, help="Blocks, likewise. One number leaves that axis out."),
    steps: int = typer.Option(10, min=1, help="Steps of training at each size."),
    batch_size: int = typer.Option(8, min=1, help="Sequences in a step."),
    learning_rate: float = typer.Option(None, help="From the first step on; by default a tenth of the peak."),
    seeds: int = typer.Option(1, min=1, help="Starts of each size, whose results are averaged."),
    bound: float = typer.Option(0.25, min=0, help="By how much a slope may exceed the one that is wanted."),
    output: Path = typer.Option(None, help="Folder for coordinates.json and coordinates.png."),
    as_json: bool = typer.Option(False, "--json", help="JSON instead of the table."),
) -> None:
    """Train a few steps at several widths and depths, and see whether activations change alike in all of them.

    Prints how the root mean square of each kind of layer's output, and of its change since step 0, follows width and
    depth in log-log. Ends with 1 where one grows with the size of the network, or vanishes: then a learning rate that
    was tuned at one size is wrong at others. docs/parametrization.md says how to read it.

    Example: `cola sweep coordinates tiny-autoregressive --widths 64,128,256,512 --depths 3,6,12 --output coordinates`
    """
    import sys

    from cola_megatron.config import load_config
    from cola_megatron.errors import ExitCode
    from cola_megatron.families import family_of
    from cola_megatron.scaling.coordinates import check_coordinates

    config = load_config(source, overrides or [])
    family = family_of(config)
    if parametrization != "config":
        config = family.with_parametrization(config, parametrization)
    width, depth = family.size(config)
    check = check_coordinates(
        config,
        _numbers("--widths", widths) or [width, 2 * width, 4 * width],
        _numbers("--depths", depths) or [depth, 2 * depth, 4 * depth],
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seeds=seeds,
        bound=bound,
        on_run=lambda width, depth: print(f"width {width}, depth {depth}", file=sys.stderr),
    )
    tree = {
        "source": source,
        "overrides": overrides or [],
        "parametrization": parametrization,
        "steps": steps,
        **_as_tree(check),
    }
    if output is not None:
        _write(output, check, tree, f"{family.describe(config)}, {source}: {parametrization}, {steps} steps")
    if as_json:
        print_json(tree)
    else:
        _print(check)
    if not check.passes:
        sys.exit(ExitCode.FAILED)


def _numbers(option: str, text: str | None) -> list[int]:
    """Raises ConfigError for what is no list of sizes."""
    from cola_megatron.config import ConfigError

    if text is None:
        return []
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise ConfigError(f"{option} {text}: give whole numbers above 0 with commas between them, as 64,128,256")
    return [int(word) for word in words]


def _as_tree(check: "CoordinateCheck") -> dict[str, Any]:
    return {
        "passes": check.passes,
        "slopes": [{**asdict(slope), "holds": slope.holds} for slope in check.slopes],
        "traces": {axis: [asdict(trace) for trace in traces] for axis, traces in check.traces.items()},
    }


def _write(folder: Path, check: "CoordinateCheck", tree: dict[str, Any], title: str) -> None:
    from cola_megatron.records.json_files import write_json
    from cola_megatron.reporting.figure_style import DOTS_PER_INCH
    from cola_megatron.scaling.coordinate_figure import coordinate_figure

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "coordinates.json", tree)
    if check.slopes:
        coordinate_figure(check, title).savefig(folder / "coordinates.png", dpi=DOTS_PER_INCH)


def _print(check: "CoordinateCheck") -> None:
    from cola_megatron.evaluation.results import format_table

    for axis, traces in check.traces.items():
        of_axis = [slope for slope in check.slopes if slope.axis == axis]
        if not of_axis:
            continue
        sizes = ", ".join(str(getattr(trace, axis)) for trace in traces)
        rows = [[f"against {axis} ({sizes})", "change", "size", "wanted", "verdict"]]
        rows += [
            [slope.coordinate, _number(slope.change), _number(slope.rms), f"{slope.wanted:+.0f}", _verdict(slope)]
            for slope in of_axis
        ]
        print(format_table(rows) + "\n")
    failing = sum(not slope.holds for slope in check.slopes)
    if check.passes:
        print("all slopes hold: activations change alike at all of these sizes, as the transfer of a rate needs")
    else:
        print(f"{failing} of {len(check.slopes)} slopes do not hold: a rate of one of these sizes is wrong at others")


def _number(slope: float | None) -> str:
    return "-" if slope is None else f"{slope:+.2f}"


def _verdict(slope: "Slope") -> str:
    from cola_megatron.scaling.coordinates import RANDOM_PART

    if slope.is_still:
        return "does not change"
    if slope.change is None or slope.rms is None:
        return "no slope"
    if slope.holds:
        return "holds"
    return "vanishes" if slope.change - slope.wanted < -RANDOM_PART else "grows"
