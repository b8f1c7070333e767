"""The families of models, by the name that `model.family` gives: the class of a run's config follows from it."""

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from cola_megatron.config.autoregressive import AutoregressiveConfig
from cola_megatron.config.cola import ColaConfig
from cola_megatron.config.errors import ConfigError
from cola_megatron.config.masked_diffusion import MaskedDiffusionConfig
from cola_megatron.config.model import ModelConfig
from cola_megatron.config.plaid import PlaidConfig
from cola_megatron.config.run import RunConfig
from cola_megatron.config.walk import annotations_of

CONFIGS: Mapping[str, type[RunConfig]] = {
    "cola": ColaConfig,
    "autoregressive": AutoregressiveConfig,
    "masked_diffusion": MaskedDiffusionConfig,
    "plaid": PlaidConfig,
}
DEFAULT: str = ModelConfig.model_fields["family"].default
"""Of a config that names none."""

Kind = TypeVar("Kind", bound=BaseModel)
OfFamily = TypeVar("OfFamily", bound=RunConfig)


def kind_of(kind: type[Kind], tree: Mapping[str, Any]) -> type[Kind]:
    """The class that a plain tree is of: a run's is that of its family; raises ConfigError for one that is unknown."""
    if kind is not RunConfig:
        return kind
    model = tree.get("model")
    family = model.get("family", DEFAULT) if isinstance(model, dict) else DEFAULT
    found = CONFIGS.get(family) if isinstance(family, str) else None
    if found is None:
        near = difflib.get_close_matches(str(family), CONFIGS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(CONFIGS)}"
        raise ConfigError(f"model.family={family!r}: there is none of that name; {hint}")
    assert issubclass(found, kind)
    return found


def kinds_of(kind: type[BaseModel]) -> list[type[BaseModel]]:
    """All classes that a tree of this kind may be of."""
    return list(CONFIGS.values()) if kind is RunConfig else [kind]


def families_that_know(key: str) -> list[str]:
    """Names of the families whose configs have this dotted key."""
    return [name for name, config in CONFIGS.items() if annotations_of(config, key)]


def require_family(config: RunConfig, kind: type[OfFamily], what: str) -> OfFamily:
    """The config as one of that family; raises ConfigError: `what` is for that family alone."""
    if not isinstance(config, kind):
        names = [name for name, known in CONFIGS.items() if known is kind]
        raise ConfigError(
            f"{what} is for model.family={names[0]}, and {config.name} has model.family={config.model.family}"
        )
    return config
