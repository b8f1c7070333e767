"""A few steps of training at one size, and what the coordinates of the family do meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cola_megatron.config import RunConfig
from cola_megatron.families import family_of
from cola_megatron.families.sizes import Coordinate

if TYPE_CHECKING:
    import torch
    from torch import nn

    from cola_megatron.parallel import ProcessGroups

Axis = Literal["width", "depth"]


@dataclass(frozen=True)
class Trace:
    """What was seen at one size: for each coordinate by name one number for every step, from before the first."""

    width: int
    depth: int
    rms: dict[str, list[float]]
    change: dict[str, list[float]]
    """Root mean square of the difference from step 0; 0 there."""
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


def trace(
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
    seen = Trace(width, depth, {}, {}, blocks)
    first: dict[str, torch.Tensor] = {}
    for step in range(steps + 1):
        with torch.no_grad(), _observed(model, coordinates) as outputs:
            model(probe, **mode)
        for name, output in outputs.items():
            start = first.setdefault(name, output)
            seen.rms.setdefault(name, []).append(_rms(output))
            seen.change.setdefault(name, []).append(_rms(output - start))
        if step < steps:
            model(batches(step), **mode)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    return seen


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
