"""A run of the autoregressive language model."""

from typing import Annotated, Literal

from cola_megatron.config.facts import OURS
from cola_megatron.config.model import ModelConfig
from cola_megatron.config.run import RunConfig
from cola_megatron.config.training import TrainingConfig
from cola_megatron.config.transformer import TransformerConfig


class AutoregressiveModelConfig(ModelConfig):
    """A causal transformer over tokens."""

    family: Annotated[Literal["autoregressive"], OURS] = "autoregressive"
    """This family: the next token follows from those before it."""
    transformer: TransformerConfig = TransformerConfig()


class AutoregressiveConfig(RunConfig):
    """One training run of the autoregressive language model."""

    model: AutoregressiveModelConfig = AutoregressiveModelConfig()
    training: TrainingConfig = TrainingConfig()

    @property
    def attention_lengths(self) -> tuple[int, ...]:
        """Positions that attention under a mask runs over in training: those of a sequence."""
        return (self.data.sequence_length,)

    @property
    def shared_widths(self) -> dict[str, int]:
        """Of the transformer."""
        return {f"model.transformer.{key}": size for key, size in self.model.transformer.shared_widths.items()}

    @property
    def attention_heads(self) -> dict[str, tuple[int, int]]:
        """Of the transformer."""
        transformer = self.model.transformer
        return {"model.transformer": (transformer.num_attention_heads, transformer.key_value_heads)}

    @property
    def shared_sequences(self) -> dict[str, int]:
        """The tokens of a sequence."""
        length = self.data.sequence_length
        return {f"data.sequence_length={length}": length}
