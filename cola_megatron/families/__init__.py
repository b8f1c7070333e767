"""The families of models. Everything above asks the family of a config and knows none by name."""

from cola_megatron.config import RunConfig
from cola_megatron.families.autoregressive.family import AutoregressiveFamily
from cola_megatron.families.cola.family import ColaFamily
from cola_megatron.families.family import Family, Kind, Measurement, Mode
from cola_megatron.families.masked_diffusion.family import MaskedDiffusionFamily
from cola_megatron.families.plaid.family import PlaidFamily

FAMILIES: dict[str, Family] = {
    family.name: family for family in (ColaFamily(), AutoregressiveFamily(), MaskedDiffusionFamily(), PlaidFamily())
}
"""By `model.family`."""

__all__ = ["FAMILIES", "Family", "Kind", "Measurement", "Mode", "family_of"]


def family_of(config: RunConfig) -> Family:
    """The family of a config."""
    return FAMILIES[config.model.family]
