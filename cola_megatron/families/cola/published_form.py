"""How a published network is written, as far as our config and float32 weights do not say it.

A checkpoint that was imported keeps it, so that its export is what was imported: types, config.json, and which of the
rotary frequencies were there. These are buffers of the published package, a function of the config but for the type
that they were rounded to; some files hold them and some do not.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from cola_megatron.config import DiTConfig
from cola_megatron.families.cola.published_configs import named_type
from cola_megatron.interop.errors import PublishedError
from cola_megatron.interop.weight_files import WeightFiles

FREQUENCIES = ".msa.rope.rope.freqs"
_SLACK = 8 * torch.finfo(torch.float32).eps
"""Powers are computed to a few last places, not alike everywhere."""


@dataclass(frozen=True)
class PublishedForm:
    """One network; plain values, to be kept as JSON."""

    config: dict[str, Any]
    """config.json, every key."""
    dtypes: dict[str, str]
    """Type of every tensor in the files, by published name."""
    frequencies: dict[str, list[float]]
    """Rotary frequencies that are not, bit for bit, what the formula gives here."""

    def in_type(self, dtype: torch.dtype) -> "PublishedForm":
        """The same network with all weights of one type; frequencies, which are not weights, stay as they are."""
        frequencies = {name for name in self.dtypes if name.endswith(FREQUENCIES)}
        dtypes = {name: old if name in frequencies else named_type(dtype) for name, old in self.dtypes.items()}
        keys = {"dtype", "torch_dtype"} & self.config.keys() or {"dtype"}
        return replace(self, config={**self.config, **dict.fromkeys(keys, named_type(dtype))}, dtypes=dtypes)


def frequency_names(config: DiTConfig) -> list[str]:
    """Published names of the buffers, one for each layer of the DiT."""
    return [f"blocks.{layer}{FREQUENCIES}" for layer in range(config.num_layers)]


def rotary_frequencies(config: DiTConfig) -> torch.Tensor:
    """base^(-2i / rotary_dim), rounded: (rotary_dim / 2,), float32."""
    exponents = torch.arange(0, config.rotary_dim, 2).float() / config.rotary_dim
    return (1.0 / config.rotary_base**exponents).to(getattr(torch, config.rotary_precision)).float()


def understood_frequencies(files: WeightFiles, config: DiTConfig) -> tuple[DiTConfig, dict[str, list[float]]]:
    """What the frequencies in the files say.

    Returns:
        the config with the type that they were rounded to, and those whose bits are nevertheless not ours.

    Raises:
        PublishedError: some are no rounding of the formula, or layers differ: we compute positions by the config.
    """
    stored = {name: files.read(name) for name in frequency_names(config) if name in files.tensors}
    examples = {}  # a tensor of each type found
    for name, frequencies in stored.items():
        precision = _precision(frequencies, rotary_frequencies(config))
        if precision is None:
            raise PublishedError(
                f"{files.tensors[name].file}: {name} is not 1 / {config.rotary_base:g}^(2i / {config.rotary_dim}), the "
                "rotary frequencies that this model computes with; with others it would be another model"
            )
        examples[precision] = name
    if len(examples) > 1:
        found = " and ".join(f"{name} to {precision}" for precision, name in sorted(examples.items()))
        raise PublishedError(f"{files.source}: rounded are {found}; one type must hold for all layers")
    config = config.model_copy(update={"rotary_precision": next(iter(examples), config.rotary_precision)})
    formula = rotary_frequencies(config)
    return config, {
        name: frequencies.float().tolist()
        for name, frequencies in stored.items()
        if not torch.equal(frequencies, formula.to(frequencies.dtype))
    }


def _precision(frequencies: torch.Tensor, formula: torch.Tensor) -> str | None:
    """The type whose rounding of the formula they are, whatever type they are stored in."""
    if frequencies.shape != formula.shape:
        return None
    values = frequencies.float()
    for precision in (torch.float32, torch.bfloat16, torch.float16):
        rounding = _SLACK if precision == torch.float32 else torch.finfo(precision).eps / 2 + _SLACK
        close = ((values - formula).abs() <= rounding * formula).all()
        if close and torch.equal(values.to(precision).float(), values):
            return named_type(precision)
    return None
