"""Whether two models on disk are the same: configs, tokenizers, tensors, and what they compute.

Either may be a published folder, a run folder or a checkpoint. Tensors are compared one by one, in float32 and by our
names; for the forward pass the two models are built one after the other.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from cola_megatron import ColaDLM
from cola_megatron.config import ModelConfig
from cola_megatron.interop.published import FOLDERS, is_published
from cola_megatron.interop.published_configs import REMARKS
from cola_megatron.interop.stored_model import ModelSource, open_model_source

ROUNDING = 1e-6
"""Relative difference up to which two float32 passes are one computation, summed in another order."""
BLOCKS, SEED, ABSENT = 3, 0, "absent"


class Unequal(NamedTuple):
    """A named value that differs."""

    name: str
    first: Any
    second: Any


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
    sources = open_model_source(first), open_model_source(second)
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
    both = first.has_prior and second.has_prior
    trees = (source.config.model_dump(mode="json") for source in (first, second))
    ours = [each for each in _unequal("model.", *trees) if both or not each.name.startswith("model.dit.")]
    if first.forms is None or second.forms is None:
        return ours, []
    # This one is said by tensors, not by config.json.
    unequal = [each for each in ours if each.name == "model.dit.rotary_precision"]
    remarks: list[Unequal] = []
    for part in sorted(first.forms.keys() & second.forms.keys()):
        folder, forms = FOLDERS[part], (first.forms[part], second.forms[part])
        for each in _unequal("", *(form.config for form in forms)):
            named = each._replace(name=f"{folder}/config.json: {each.name}")
            (remarks if each.name in REMARKS else unequal).append(named)
        remarks += _unequal(f"{folder}: type of ", *(form.dtypes for form in forms))
        remarks += _unequal(f"{folder}: values of ", *(form.frequencies for form in forms))
    return unequal, remarks


def _unequal(prefix: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Unequal]:
    for key in sorted(first.keys() | second.keys()):
        ours, theirs = first.get(key, ABSENT), second.get(key, ABSENT)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            yield from _unequal(f"{prefix}{key}.", ours, theirs)
        elif ours != theirs:
            yield Unequal(f"{prefix}{key}", ours, theirs)


def _compare_tokenizers(first: Path | None, second: Path | None) -> str:
    if first is None or second is None:
        return "equal" if first is second else f"only in the {'first' if second is None else 'second'}"
    return "equal" if first.read_bytes() == second.read_bytes() else "different"


def _compare_outputs(first: Path, second: Path, ours: ModelSource, theirs: ModelSource) -> list[Distance]:
    """Nothing where the models do not take the same inputs."""
    if _inputs_of(ours.config) != _inputs_of(theirs.config):
        return []
    prior = ours.has_prior and theirs.has_prior
    outputs, others = (_outputs(folder, ours.config, prior) for folder in (first, second))
    return [distance(name, output, others[name]) for name, output in outputs.items()]


def _inputs_of(config: ModelConfig) -> tuple[int, ...]:
    vae, dit = config.vae, config.dit
    return config.vocab_size, vae.latent_dim, vae.patch_size, vae.block_size, dit.block_size


def _outputs(folder: Path, config: ModelConfig, prior: bool) -> dict[str, torch.Tensor]:
    """What a model computes from tokens, latents and a time that depend on the config alone."""
    model = (ColaDLM.from_published if is_published(folder) else ColaDLM.from_checkpoint)(folder, device="cpu")
    generator, vae = torch.Generator().manual_seed(SEED), config.vae
    latents = BLOCKS * math.lcm(vae.block_size, config.dit.block_size)
    ids = torch.randint(0, config.vocab_size, (latents * vae.patch_size,), generator=generator)
    clean, noisy = torch.randn(2, 1, latents, vae.latent_dim, generator=generator)
    mean, logvar = model.encode(ids)
    outputs = {"encode, mean": mean, "encode, log variance": logvar, "decode": model.decode(clean[0], [latents])}
    if prior:
        outputs["velocity"] = model.velocity(clean, noisy, torch.tensor([0.5]))
    return outputs
