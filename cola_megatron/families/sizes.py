"""Other widths and depths of a config's networks, and what of them shows whether a parametrisation holds.

Shared by the families: heads and feed-forward grow with the width, the channels of a head stay.
"""

from typing import NamedTuple, TypeVar

from cola_megatron.config import ConfigError, DiTConfig, RunConfig, VAEConfig
from cola_megatron.config.parametrization import ParametrizationConfig
from cola_megatron.config.resolve import resolve_config
from cola_megatron.config.transformer import TransformerConfig

Config = TypeVar("Config", bound=RunConfig)
Network = TypeVar("Network", TransformerConfig, VAEConfig, DiTConfig)

FEED_FORWARD_UNIT = 8
"""A feed-forward whose exact width would be a fraction is rounded to a multiple of this."""


class Coordinate(NamedTuple):
    """A tensor of the forward pass whose size must not depend on width and depth."""

    name: str
    """In words."""
    modules: str
    """Dotted name of the module whose output it is; `*` for every block, `1*` for every block but the first: the
    mean square over them is taken."""
    stack: str
    """Dotted name of the module with the `blocks` that are its depth."""
    of_branch: bool = False
    """One of as many additions to the residual stream as there are blocks: each must be 1 / depth of a fixed size."""
    before_norm: bool = False
    """Nothing but a norm reads it: its changes count relative to its start."""
    is_update: bool = False
    """Not the output but what it adds to the module's first input."""


TRANSFORMER_COORDINATES = (
    Coordinate("attention branch", "transformer.blocks.*.attention", "transformer", of_branch=True),
    Coordinate("feed-forward branch", "transformer.blocks.*.ffn", "transformer", of_branch=True),
    Coordinate("residual stream", "transformer.blocks.-1", "transformer", before_norm=True),
    Coordinate("logits", "transformer.head", "transformer"),
)


def with_networks(config: Config, **networks: TransformerConfig | VAEConfig | DiTConfig) -> Config:
    """The config with these sections of `model` in place of its own, checked as a whole; raises ConfigError."""
    model = config.model.model_dump() | {name: network.model_dump() for name, network in networks.items()}
    changed = resolve_config(config.model_dump() | {"model": model})
    assert isinstance(changed, type(config))
    return changed


def parametrized(network: Network, kind: str, depth: int) -> Network:
    """The network under another parametrisation, whose base is its own width and `depth`."""
    section = ParametrizationConfig.model_validate(
        {"kind": kind, "base_width": network.hidden_size, "base_depth": depth}
    )
    return network.model_copy(update={"parametrization": section})


def scaled_transformer(network: TransformerConfig, width: int, depth: int) -> TransformerConfig:
    """The shared transformer at another width and depth; raises ConfigError for a width without whole heads."""
    key_value_heads = network.num_key_value_heads
    return network.model_copy(
        update={
            "num_layers": depth,
            "hidden_size": width,
            "ffn_hidden_size": scaled_feed_forward(network.ffn_hidden_size, network.hidden_size, width),
            "num_attention_heads": scaled_heads(
                "model.transformer", network.num_attention_heads, network.hidden_size, width
            ),
            "num_key_value_heads": key_value_heads
            and scaled_heads("model.transformer", key_value_heads, network.hidden_size, width),
        }
    )


def scaled_heads(section: str, heads: int, width: int, new_width: int) -> int:
    """Heads in proportion to the width; raises ConfigError where that is no whole number."""
    found, rest = divmod(heads * new_width, width)
    if rest or not found:
        raise ConfigError(
            f"width {new_width}: {section} has {heads} heads at hidden_size={width}, and {new_width} is no whole "
            f"number of heads of the same size; give a multiple of {-(-width // heads)}"
        )
    return found


def scaled_feed_forward(inner: int, width: int, new_width: int) -> int:
    """In proportion to the width; a fraction is rounded to a multiple of `FEED_FORWARD_UNIT`."""
    found, rest = divmod(inner * new_width, width)
    if rest == 0:
        return found
    return max(1, round(inner * new_width / width / FEED_FORWARD_UNIT)) * FEED_FORWARD_UNIT
