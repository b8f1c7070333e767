"""The coordinate check: whether sizes of activations, and of their changes in training, depend on width and depth.

A few steps of training at several widths (one depth) and several depths (one width), the same draws in all of them. Of
each `Coordinate` of the family the root mean square on one batch is followed, and that of its difference from step 0.
Under a parametrisation that lets learning rates transfer, the change neither grows nor vanishes with the size: its
slope in log-log is near 0, and near -1 against the depth for one of as many branches as there are blocks
(arXiv 2203.03466, appendix D.1; arXiv 2505.01618).

Small networks still see the random part of their start: a sum of n independent terms, each 1 / n, falls as n^-1/2
beside what learning adds to all of them alike. So a slope may be lower by more than it may be higher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cola_megatron.config import ConfigError, RunConfig
from cola_megatron.config.resolve import resolve_config
from cola_megatron.families import family_of
from cola_megatron.families.sizes import Coordinate
from cola_megatron.scaling.coordinate_trace import Axis, Trace, trace

BOUND = 0.25
"""By how much a slope may be above the one that is wanted; under `standard` it is above by 0.5 to 3."""
RANDOM_PART = 0.5
"""By how much it may be below."""
RATE_SHARE = 0.1
"""Of the peak learning rate, which the check takes from the first step on, without a warm-up."""


@dataclass(frozen=True)
class Slope:
    """How a coordinate follows an axis, d log RMS / d log size, after the last step."""

    coordinate: str
    axis: Axis
    change: float | None
    """Of the change since step 0; None: it did not change, or fewer than two sizes have it."""
    rms: float | None
    """Of the size itself; None: fewer than two sizes have it."""
    wanted: float
    bound: float
    is_still: bool = False
    """It did not change at any size: nothing was trained that it depends on."""

    @property
    def holds(self) -> bool:
        """Whether the change neither grows nor vanishes with the size of the network, and the size does not grow.

        One that fewer than two sizes have says nothing against it; one that did not change shows nothing for it.
        """
        if self.is_still:
            return False
        if self.change is None or self.rms is None:
            return True
        return -RANDOM_PART <= self.change - self.wanted <= self.bound and self.rms - self.wanted <= self.bound


@dataclass(frozen=True)
class CoordinateCheck:
    """What `check_coordinates` found."""

    coordinates: tuple[Coordinate, ...]
    traces: dict[Axis, list[Trace]]
    """Sizes in order; an axis with one size has no slopes."""
    slopes: list[Slope] = field(default_factory=list)

    @property
    def passes(self) -> bool:
        """Whether every slope holds."""
        return all(slope.holds for slope in self.slopes)


def check_coordinates(
    config: RunConfig,
    widths: Sequence[int],
    depths: Sequence[int],
    *,
    steps: int = 10,
    batch_size: int = 8,
    learning_rate: float | None = None,
    seeds: int = 1,
    bound: float = BOUND,
    on_run: Callable[[int, int], None] = lambda width, depth: None,
) -> CoordinateCheck:
    """Trains the config's model for a few steps at each size, in this process, and fits the slopes.

    Tokens are those of `data.path`, else of a random chain.

    Args:
        widths: of the family's main network, at the depth of the config; one: no slopes against the width.
        depths: likewise at the width of the config.
        learning_rate: from the first step on; None: `RATE_SHARE` of the config's peak.
        seeds: runs of each size, whose sizes are averaged (geometrically).
        on_run: called before every run.

    Raises:
        ConfigError: a size that the family cannot have, or fewer than one step.
    """
    if steps < 1 or seeds < 1 or batch_size < 1:
        raise ConfigError(f"steps={steps}, seeds={seeds}, batch_size={batch_size}: each must be at least 1")
    family, config = family_of(config), _config_of_check(config, batch_size)
    rate = RATE_SHARE * config.training.optimizer.learning_rate if learning_rate is None else learning_rate
    width, depth = family.size(config)
    sizes: dict[Axis, list[tuple[int, int]]] = {
        "width": [(each, depth) for each in sorted(set(widths))],
        "depth": [(width, each) for each in sorted(set(depths))],
    }
    # All of them before the first is trained: a width may be refused.
    configs = {size: family.scaled(config, *size) for axis in sizes.values() for size in axis}
    coordinates = tuple(family.coordinates(config))
    seen: dict[tuple[int, int], Trace] = {}
    for size, of_size in configs.items():
        on_run(*size)
        runs = [trace(of_size, coordinates, *size, config.seed + number, steps, rate) for number in range(seeds)]
        seen[size] = _mean(runs)
    traces = {axis: [seen[size] for size in of_axis] for axis, of_axis in sizes.items()}
    slopes = [
        _slope(coordinate, axis, of_axis, bound)
        for axis, of_axis in traces.items()
        if len(of_axis) > 1
        for coordinate in coordinates
    ]
    return CoordinateCheck(coordinates, traces, slopes)


def _config_of_check(config: RunConfig, batch_size: int) -> RunConfig:
    """One micro-batch per step in float32, in one process, whose logits are seen."""
    tree = family_of(config).measured_config(config).model_dump()
    tree["training"] |= {
        "global_batch_size": batch_size,
        "micro_batch_size": batch_size,
        "precision": "fp32",
        "loss_chunk_tokens": 0,
        "activation_checkpointing": False,
        "compile_blocks": "never",
    }
    tree["parallel"] = {}
    return resolve_config(tree)


def _mean(runs: Sequence[Trace]) -> Trace:
    """The geometric mean over seeds."""

    def mean(of_runs: Sequence[Mapping[str, list[float]]]) -> dict[str, list[float]]:
        with np.errstate(divide="ignore"):
            return {
                name: np.exp(np.mean([np.log(each[name]) for each in of_runs], axis=0)).tolist() for name in of_runs[0]
            }

    first = runs[0]
    rms, change = mean([run.rms for run in runs]), mean([run.change for run in runs])
    return Trace(first.width, first.depth, rms, change, first.blocks)


def _slope(coordinate: Coordinate, axis: Axis, traces: Sequence[Trace], bound: float) -> Slope:
    name = coordinate.name
    traces = [trace for trace in traces if name in trace.rms]  # one with a single block may have none of them
    sizes = [trace.size_along(axis, coordinate) for trace in traces]
    wanted = -1.0 if axis == "depth" and coordinate.of_branch else 0.0

    def slope(values: Sequence[float]) -> float | None:
        if len(set(sizes)) < 2 or not any(values):
            return None
        if not all(value > 0 and math.isfinite(value) for value in values):
            return math.inf
        return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])

    changes = [trace.last_change(coordinate) for trace in traces]
    change, rms = slope(changes), slope([trace.rms[name][-1] for trace in traces])
    return Slope(name, axis, change, rms, wanted, bound, is_still=bool(changes) and not any(changes))
