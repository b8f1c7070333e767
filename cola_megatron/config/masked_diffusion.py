"""A run of masked diffusion: LLaDA (arXiv 2502.09992), or by blocks BD3-LM (arXiv 2503.09573)."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cola_megatron.config.base import Section
from cola_megatron.config.facts import OURS, PUBLISHED
from cola_megatron.config.model import ModelConfig
from cola_megatron.config.run import RunConfig
from cola_megatron.config.training import TrainingConfig
from cola_megatron.config.transformer import TransformerConfig
from cola_megatron.config.types import NOT_BOOL, NonNegativeInt, PositiveInt, Share


class MaskedDiffusionModelConfig(ModelConfig):
    """A transformer that predicts masked tokens from all others, or from those of its block and the blocks before."""

    family: Annotated[Literal["masked_diffusion"], OURS] = "masked_diffusion"
    """Masked diffusion: LLaDA, the matched baseline of the paper, and its form by blocks."""
    transformer: TransformerConfig = TransformerConfig()
    block_size: Annotated[PositiveInt | None, OURS] = None
    """Tokens that are denoised together while they see the clean blocks before them (BD3-LM); must divide
    data.sequence_length. null: the whole sequence at once, as in LLaDA; 1 is an autoregressive factorisation."""
    mask_token_id: Annotated[NonNegativeInt | None, OURS] = None
    """What stands for [MASK]. null: a row of the embedding beyond the vocabulary, which no text can hold. LLaDA's own
    weights use a token of the vocabulary (126336): then no text may hold that."""

    @property
    def mask_id(self) -> int:
        """The id of [MASK] in the embedding."""
        return self.vocab_size if self.mask_token_id is None else self.mask_token_id

    @property
    def extra_rows(self) -> int:
        """Rows of the embedding beyond the vocabulary."""
        return int(self.mask_token_id is None)

    @model_validator(mode="after")
    def _consistent(self) -> "MaskedDiffusionModelConfig":
        if self.mask_token_id is not None and self.mask_token_id >= self.vocab_size:
            raise ValueError(
                f"mask_token_id={self.mask_token_id} must be a token of the vocabulary, below vocab_size="
                f"{self.vocab_size}; null adds a row of its own"
            )
        return self


class MaskedDiffusionObjectiveConfig(Section):
    """Cross-entropy of the masked tokens over t, which bounds -log p(x) in nats per token."""

    min_time: Annotated[float, Field(gt=0, lt=1), NOT_BOOL, PUBLISHED] = 1e-3
    """t is uniform on (min_time, 1]. A token that is masked at time t weighs 1/t: the floor, LLaDA's own, keeps one of
    them from weighing more than 1,000 others, and leaves out a thousandth of the integral over t."""
    times: Annotated[Literal["uniform", "low_discrepancy"], OURS] = "uniform"
    """uniform: each sample (or block) draws its t, as in LLaDA. low_discrepancy: those of a step are spread evenly over
    (min_time, 1], from one draw for the step and the sample's index: less variance, the same expectation."""
    random_length_share: Annotated[Share, PUBLISHED] = 0.01
    """Share of the samples that are cut to a length drawn from 1 .. data.sequence_length, so that the network meets
    texts of every length; LLaDA's value. Above 0 attention runs under a mask tensor."""


class MaskedDiffusionConfig(RunConfig):
    """One training run of masked diffusion."""

    model: MaskedDiffusionModelConfig = MaskedDiffusionModelConfig()
    objective: MaskedDiffusionObjectiveConfig = MaskedDiffusionObjectiveConfig()
    training: TrainingConfig = TrainingConfig()

    @property
    def block_size(self) -> int:
        """Tokens that share a time: those of a block, or of the whole sequence."""
        return self.data.sequence_length if self.model.block_size is None else self.model.block_size

    @property
    def network_length(self) -> int:
        """Positions that the network runs over: the sequence, or both of its copies without the last clean block."""
        length, block = self.data.sequence_length, self.block_size
        return length if block == length else 2 * length - block

    @property
    def attention_lengths(self) -> tuple[int, ...]:
        """Positions that attention under a mask runs over in training."""
        return (self.network_length,)

    @property
    def has_two_copies(self) -> bool:
        """By blocks."""
        return self.block_size < self.data.sequence_length

    @property
    def shared_widths(self) -> dict[str, int]:
        """What tensor-parallel ranks share and must divide, by its key."""
        return {f"model.transformer.{key}": size for key, size in self.model.transformer.shared_widths.items()}

    @property
    def attention_heads(self) -> dict[str, tuple[int, int]]:
        """Of the transformer."""
        transformer = self.model.transformer
        return {"model.transformer": (transformer.num_attention_heads, transformer.key_value_heads)}

    @property
    def shared_sequences(self) -> dict[str, int]:
        """Positions that sequence parallelism cuts, by words that a refusal begins with."""
        length, block = self.data.sequence_length, self.block_size
        if block == length:
            return {f"data.sequence_length={length}": length}
        copies = self.network_length
        return {f"model.block_size={block}: 2 * {length} tokens - block_size = {copies}, which": copies}

    def check_family(self) -> None:
        """A block that does not divide the sequence is refused, and a noisy copy that ranks cannot share."""
        length, block = self.data.sequence_length, self.block_size
        if length % block:
            raise ValueError(f"model.block_size={block} must divide data.sequence_length={length}")
        if length % self.parallel.context_parallel_size:
            raise ValueError(
                f"data.sequence_length={length} must be divisible by parallel.context_parallel_size="
                f"{self.parallel.context_parallel_size}"
            )
