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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cola_megatron.config import ConfigError, RunConfig
from cola_megatron.config.resolve import resolve_config
from cola_megatron.families import family_of
from cola_megatron.families.sizes import Coordinate

if TYPE_CHECKING:
    import torch
    from torch import nn

    from cola_megatron.parallel import ProcessGroups

Axis = Literal["width", "depth"]

BOUND = 0.25
"""By how much a slope may be above the one that is wanted; under `standard` it is above by 0.5 to 3."""
RANDOM_PART = 0.5
"""By how much it may be below."""
RATE_SHARE = 0.1
"""Of the peak learning rate, which the check takes from the first step on, without a warm-up."""


@dataclass(frozen=True)
class Trace:
    """What was seen at one size: for each coordinate by name one number for every step, from before the first."""

    width: int
    depth: int
    rms: dict[str, list[float]]
    change: dict[str, list[float]]
    """Root mean square of the difference from step 0; 0 there."""
    losses: list[float]
    blocks: dict[str, int]
    """For each coordinate the depth of its own network."""

    def size_along(self, axis: Axis, coordinate: Coordinate) -> int:
        """Width of the main network, or depth of the coordinate's own."""
        return self.width if axis == "width" else self.blocks[coordinate.name]

    def last_change(self, coordinate: Coordinate) -> float:
        """Of the last step, relative to the start where only a norm reads it; 0 where this size has none of it."""
        if coordinate.name not in self.change:
            return 0.0
        start = self.rms[coordinate.name][0] if coordinate.before_norm else 1.0
        return self.change[coordinate.name][-1] / start


@dataclass(frozen=True)
class Slope:
    """How a coordinate follows an axis, d log RMS / d log size, after the last step."""

    coordinate: str
    axis: Axis
    change: float | None
    """Of the change since step 0; None: it did not change, or fewer than two sizes have it."""
    rms: float | None
    """Of the size itself; None likewise."""
    wanted: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the change neither grows nor vanishes with the size of the network, and the size does not grow."""
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
        runs = [_trace(of_size, coordinates, *size, config.seed + number, steps, rate) for number in range(seeds)]
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

    losses = np.mean([run.losses for run in runs], axis=0).tolist()
    first = runs[0]
    rms, change = mean([run.rms for run in runs]), mean([run.change for run in runs])
    return Trace(first.width, first.depth, rms, change, losses, first.blocks)


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

    change, rms = (
        slope([trace.last_change(coordinate) for trace in traces]),
        slope([trace.rms[name][-1] for trace in traces]),
    )
    return Slope(name, axis, change, rms, wanted, bound)


def _trace(
    config: RunConfig,
    coordinates: Collection[Coordinate],
    width: int,
    depth: int,
    seed: int,
    steps: int,
    learning_rate: float,
) -> Trace:
    """Trains one model, and looks at it before the first step and after each."""
    import torch

    from cola_megatron.parallel import initialize_parallel, initialize_parameters
    from cola_megatron.parallel.muon import MuonAdamW
    from cola_megatron.training.optimizer import build_optimizer, set_learning_rates

    groups, family = initialize_parallel(), family_of(config)
    model = family.build(config, groups)
    initialize_parameters(model, seed, groups)
    model.to(groups.device)
    optimizer = build_optimizer(model, config, groups)
    if isinstance(optimizer, MuonAdamW):
        optimizer.share_whole(groups)
    set_learning_rates(optimizer.param_groups, learning_rate, idle=())
    batches, mode = _batches(config, groups), family.mode_at(config, 0)
    probe = batches(steps)
    blocks = {each.name: len(list(model.get_submodule(f"{each.stack}.blocks").children())) for each in coordinates}
    trace = Trace(width, depth, {}, {}, [], blocks)
    first: dict[str, torch.Tensor] = {}
    for step in range(steps + 1):
        with torch.no_grad(), _observed(model, coordinates) as outputs:
            model(probe, **mode)
        for name, output in outputs.items():
            start = first.setdefault(name, output)
            trace.rms.setdefault(name, []).append(_rms(output))
            trace.change.setdefault(name, []).append(_rms(output - start))
        if step < steps:
            loss = model(batches(step), **mode)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            trace.losses.append(loss.item())
    return trace


def _rms(tensor: torch.Tensor) -> float:
    return math.sqrt(tensor.double().square().mean().item())


@contextmanager
def _observed(model: nn.Module, coordinates: Collection[Coordinate]) -> Iterator[dict[str, torch.Tensor]]:
    """By coordinate what its modules give in the last forward pass inside, stacked over blocks."""
    import torch

    seen: dict[str, dict[int, torch.Tensor]] = {coordinate.name: {} for coordinate in coordinates}
    outputs: dict[str, torch.Tensor] = {}

    def keep(coordinate: Coordinate, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            seen[coordinate.name][index] = (output - inputs[0] if coordinate.is_update else output).float()

        return hook

    hooks = [
        module.register_forward_hook(keep(coordinate, index))
        for coordinate in coordinates
        for index, module in enumerate(_modules(model, coordinate.modules))
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
    outputs |= {
        name: torch.stack([blocks[index] for index in sorted(blocks)]) for name, blocks in seen.items() if blocks
    }


def _modules(model: nn.Module, name: str) -> list[nn.Module]:
    """Those of a dotted name; `*` stands for every block, `1*` for those behind the first, -1 for the last."""
    found = [model]
    for part in name.split("."):
        if part in ("*", "1*"):
            found = [child for module in found for child in list(module.children())[part != "*" :]]
        elif part == "-1":
            found = [list(module.children())[-1] for module in found]
        else:
            found = [module.get_submodule(part) for module in found]
    return found


def _batches(config: RunConfig, groups: ProcessGroups) -> Callable[[int], dict[str, torch.Tensor]]:
    """The batch of each step, the same for every size."""
    from cola_megatron.training.batches import MicroBatches

    samples: Any
    if config.data.path is None:
        samples = _Chain(config.model.vocab_size, config.data.sequence_length)
    else:
        from cola_megatron.data import training_samples
        from cola_megatron.data.run_shards import open_shards

        samples = training_samples(open_shards(config, config.data.path, ["train"], groups)[0], config.data.seed)
    batches = MicroBatches(config, samples, replica=0, replicas=1)
    return lambda step: {name: tensor.to(groups.device) for name, tensor in batches[step].tensors.items()}


class _Chain:
    """Tokens of a random chain, of which there is something to learn: three in four follow from the one before."""

    padding_id = end_of_text_id = -1

    def __init__(self, vocab_size: int, length: int):
        self.length, random = length, np.random.default_rng(0)
        self.words = random.permutation(vocab_size)[:32]
        self.follows = random.permutation(len(self.words))

    def read(self, start: int, count: int) -> Iterator[Any]:
        from cola_megatron.data.samples import Sample

        for index in range(start, start + count):
            random = np.random.default_rng(index)
            ids = random.integers(0, len(self.words), self.length)
            keeps = random.random(self.length) < 0.75
            for place in range(1, self.length):
                if keeps[place]:
                    ids[place] = self.follows[ids[place - 1]]
            yield Sample(self.words[ids], None)
