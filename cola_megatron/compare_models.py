"""Whether two models on disk are the same: configs, tokenizers, tensors, and what they compute.

Either may be a published folder, a run folder or a checkpoint. Tensors are compared one by one, in float32 and by our
names; for the forward pass the two models are built one after the other.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from cola_megatron.conversion.open_model import open_model
from cola_megatron.families import FAMILIES
from cola_megatron.interface import load_model
from cola_megatron.interop.differences import Unequal
from cola_megatron.interop.weight_source import ModelSource

ROUNDING = 1e-6
"""Relative difference up to which two float32 passes are one computation, summed in another order."""


class Distance(NamedTuple):
    """How far two tensors are apart; infinitely where one has a NaN that the other has not."""

    name: str
    absolute: float
    """Largest difference."""
    relative: float
    """The same over the largest magnitude in either."""


@dataclass(frozen=True)
class Comparison:
    """What differs between two models."""

    configs: list[Unequal]
    """Keys of config.json where both models have one, else of our model section."""
    remarks: list[Unequal]
    """Keys of config.json that say nothing about the model, and how a tensor is stored."""
    tokenizer: str
    """`equal`, `different`, or which model alone has one."""
    only_first: list[str]
    only_second: list[str]
    shapes: list[Unequal]
    tensors: int
    """How many both have."""
    distances: list[Distance]
    """Of the tensors that are not equal bit for bit, the farthest first."""
    outputs: list[Distance]
    """Of encode, decode and velocity; empty where these were not compared."""

    def equal(self, tolerance: float | None = None) -> bool:
        """None: in every bit. A number: the same function up to that relative difference of tensors and outputs."""
        if self.configs or self.only_first or self.only_second or self.shapes or self.tokenizer != "equal":
            return False
        if tolerance is None:
            return not self.remarks and not self.distances and all(out.relative <= ROUNDING for out in self.outputs)
        return all(each.relative <= tolerance for each in (*self.distances, *self.outputs))


def compare_models(first: Path, second: Path, forward: bool = True, progress: bool = True) -> Comparison:
    """Compares two folders.

    Args:
        forward: also compare what both compute from fixed inputs. That builds each model, one after the other.

    Raises:
        UserError: one of the folders is no model, or is damaged.
    """
    sources = open_model(first), open_model(second)
    shapes, others = (dict(source.shapes) for source in sources)
    common = sorted(shapes.keys() & others.keys())
    misshapen = [Unequal(name, shapes[name], others[name]) for name in common if shapes[name] != others[name]]
    distances = []
    for name in tqdm(common, disable=not progress, unit="tensor", desc="compare"):
        if shapes[name] == others[name]:
            ours, theirs = (source.read(name) for source in sources)
            if not torch.equal(ours.view(torch.int32), theirs.view(torch.int32)):
                distances.append(distance(name, ours, theirs))
    return Comparison(
        *_unequal_configs(*sources),
        _compare_tokenizers(*(source.tokenizer for source in sources)),
        only_first=sorted(shapes.keys() - others.keys()),
        only_second=sorted(others.keys() - shapes.keys()),
        shapes=misshapen,
        tensors=len(common),
        distances=sorted(distances, key=lambda each: -each.relative),
        outputs=_compare_outputs(first, second, *sources) if forward else [],
    )


def distance(name: str, first: torch.Tensor, second: torch.Tensor) -> Distance:
    """Of two float32 tensors of one shape."""
    difference = (first - second).abs_().nan_to_num_(nan=math.inf, posinf=math.inf)
    difference[(first == second) | (first.isnan() & second.isnan())] = 0.0
    absolute = difference.max().item()
    if absolute in (0.0, math.inf):
        return Distance(name, absolute, absolute)
    scale = max(each.nan_to_num(0.0, 0.0, 0.0).abs().max().item() for each in (first, second))
    return Distance(name, absolute, absolute / scale)


def _unequal_configs(first: ModelSource, second: ModelSource) -> tuple[list[Unequal], list[Unequal]]:
    """The keys that make another model, and the remarks."""
    families = first.config.family, second.config.family
    if families[0] != families[1]:
        return [Unequal("model.family", *families)], []
    return FAMILIES[families[0]].compare_sources(first, second)


def _compare_tokenizers(first: Path | None, second: Path | None) -> str:
    if first is None or second is None:
        return "equal" if first is second else f"only in the {'first' if second is None else 'second'}"
    return "equal" if first.read_bytes() == second.read_bytes() else "different"


def _compare_outputs(first: Path, second: Path, ours: ModelSource, theirs: ModelSource) -> list[Distance]:
    """Of what both compute from inputs that their configs alone decide; nothing where they take other inputs."""
    if ours.config.family != theirs.config.family or _inputs(ours) != _inputs(theirs):
        return []
    outputs, others = (load_model(folder, device="cpu").fixed_outputs() for folder in (first, second))
    return [distance(name, output, others[name]) for name, output in outputs.items() if name in others]


def _inputs(source: ModelSource) -> tuple[int, ...]:
    return FAMILIES[source.config.family].input_sizes(source.config)
