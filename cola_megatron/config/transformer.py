"""Architecture of the LLaMA-shaped transformer that the matched baselines of the paper share (its section on RQ4)."""

from typing import Annotated

from pydantic import model_validator

from cola_megatron.config.base import Section
from cola_megatron.config.facts import OURS, PUBLISHED
from cola_megatron.config.parametrization import ParametrizationConfig
from cola_megatron.config.types import PositiveFloat, PositiveInt


class TransformerConfig(Section):
    """Embedding, blocks of attention and SwiGLU behind RMSNorms, norm, output head of its own. No biases.

    Defaults are the published sizes of the baselines of 1.8 B parameters.
    """

    num_layers: Annotated[PositiveInt, PUBLISHED] = 27
    """Blocks."""
    hidden_size: Annotated[PositiveInt, PUBLISHED] = 2048
    """Width."""
    ffn_hidden_size: Annotated[PositiveInt, PUBLISHED] = 8192
    """Width inside the feed-forward: that of the gate and that of the value, each; three matrices of
    hidden_size * ffn_hidden_size in all."""
    num_attention_heads: Annotated[PositiveInt, PUBLISHED] = 16
    """Heads of the queries; must divide `hidden_size`."""
    num_key_value_heads: Annotated[PositiveInt | None, OURS] = None
    """Heads of keys and values, each shared by as many query heads (grouped-query attention); must divide
    `num_attention_heads`. null: as many as there are of queries."""
    norm_eps: Annotated[PositiveFloat, OURS] = 1e-5
    """Epsilon of every RMSNorm."""
    rotary_base: Annotated[PositiveFloat, OURS] = 500_000.0
    """Base theta of the rotary frequencies; all channels of a head are rotated."""
    init_std: Annotated[PositiveFloat, OURS] = 0.02
    """Standard deviation of the starting weights."""
    init_cutoff_factor: Annotated[PositiveFloat, OURS] = 3.0
    """Weights start from a normal distribution cut at this many standard deviations."""
    parametrization: ParametrizationConfig = ParametrizationConfig()

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values, said or not."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def shared_widths(self) -> dict[str, int]:
        """What the number of tensor-parallel ranks must divide, by key; every other width is a multiple of these."""
        heads = "num_attention_heads" if self.num_key_value_heads is None else "num_key_value_heads"
        return {heads: self.key_value_heads, "ffn_hidden_size": self.ffn_hidden_size}

    @model_validator(mode="after")
    def _consistent(self) -> "TransformerConfig":
        heads = self.num_attention_heads
        if self.hidden_size % heads:
            raise ValueError(f"hidden_size={self.hidden_size} must be divisible by num_attention_heads ({heads})")
        if self.head_dim % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size}: hidden_size / num_attention_heads = {self.head_dim} must be even for "
                "rotary embedding"
            )
        shared = self.key_value_heads
        if heads % shared:
            raise ValueError(f"num_attention_heads={heads} must be divisible by num_key_value_heads ({shared})")
        return self
