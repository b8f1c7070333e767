"""Plaid: diffusion over learned embeddings of the tokens (Gulrajani and Hashimoto, arXiv 2305.18619).

"Published" in the docstrings is that paper's public code; Cola's paper gives no sizes for this family.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cola_megatron.config.base import Section
from cola_megatron.config.facts import OURS
from cola_megatron.config.model import ModelConfig
from cola_megatron.config.run import RunConfig
from cola_megatron.config.training import TrainingConfig
from cola_megatron.config.transformer import TransformerConfig
from cola_megatron.config.types import NOT_BOOL, Float, NonNegativeInt, PositiveFloat, PositiveInt, Share


class PlaidDiffusionConfig(Section):
    """What Plaid has beside the transformer: embeddings, noise schedule, input. Defaults are the published ones."""

    embedding_dim: Annotated[int, Field(gt=1), NOT_BOOL, OURS] = 16
    """Channels of a token's embedding, which has length 1. Published: 16."""
    gamma_start: Annotated[Float, OURS] = -3.0
    """gamma_0 = -log SNR of the cleanest state, at the start of training; it is learned. Published: -3."""
    gamma_end: Annotated[Float, OURS] = 6.0
    """gamma_1 = -log SNR of the noisiest state, likewise. Published: 6."""
    schedule_hidden_size: Annotated[PositiveInt, OURS] = 1024
    """Hidden units of the learned schedule. Published: 1024."""
    gamma_features: Annotated[int, Field(gt=2, multiple_of=2), NOT_BOOL, OURS] = 64
    """Channels of the sinusoid of gamma that the network is told. Published: 64."""

    @model_validator(mode="after")
    def _consistent(self) -> "PlaidDiffusionConfig":
        if self.gamma_start >= self.gamma_end:
            raise ValueError(f"gamma_start={self.gamma_start} must be below gamma_end={self.gamma_end}")
        return self


class PlaidObjectiveConfig(Section):
    """How the variational bound is estimated in training."""

    self_conditioning: Annotated[Share, OURS] = 0.25
    """Share of the samples whose network is told its own first estimate, from a pass without gradients; above 0, the
    model does so at every evaluation. Such a sample trains the network alone, and neither embeddings nor schedule.
    Published: 0.25. Must be 0 in a pipeline."""
    reconstruction_share: Annotated[Share, OURS] = 0.125
    """Share of the samples that estimate the reconstruction, at t = 0; the others estimate the diffusion term. Of a
    global batch at least one, and not all. Published: by the two terms' standard deviations so far, which would be a
    state of training; 1/8 where it evaluates."""
    output_prior_warmup_steps: Annotated[NonNegativeInt, OURS] = 5000
    """Steps over which log p(z_t | token), added to the network's logits, rises to its full weight. Published: 5000."""
    learning_rate_ratio: Annotated[PositiveFloat, OURS] = 1.0
    """Learning rate of embeddings, noise schedule and input over that of the transformer. Published: about 7 (0.01 over
    0.0014), and there the input learns like the transformer."""
    cut_share: Annotated[Share, OURS] = 2 / 256
    """Share of the samples that are cut at a random place into two texts which do not see each other: the model must
    know texts shorter than its training sequences. Published: 2 of 256."""


class PlaidModelConfig(ModelConfig):
    """The transformer of the matched baselines over noisy embeddings."""

    family: Annotated[Literal["plaid"], OURS] = "plaid"
    """Which model this is."""
    transformer: TransformerConfig = TransformerConfig()
    diffusion: PlaidDiffusionConfig = PlaidDiffusionConfig()


class PlaidConfig(RunConfig):
    """One training run of Plaid."""

    model: PlaidModelConfig = PlaidModelConfig()
    objective: PlaidObjectiveConfig = PlaidObjectiveConfig()
    training: TrainingConfig = TrainingConfig()

    @property
    def attention_lengths(self) -> tuple[int, ...]:
        """Those of a sequence: documents and cut samples have a mask."""
        return (self.data.sequence_length,)

    @property
    def shared_widths(self) -> dict[str, int]:
        """Of the transformer, whose width the noisy input has too."""
        shared = {f"model.transformer.{key}": size for key, size in self.model.transformer.shared_widths.items()}
        return {**shared, "model.transformer.hidden_size": self.model.transformer.hidden_size}

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

    def check_family(self) -> None:
        """Both terms need a sample, and a pipeline cannot run the network twice."""
        batch, stages = self.training.global_batch_size, self.parallel.pipeline_parallel_size
        if batch < 2:
            raise ValueError(
                f"training.global_batch_size={batch}: Plaid needs at least 2 samples in a step, one for the "
                "reconstruction and one for the diffusion term"
            )
        share = self.objective.self_conditioning
        if share and stages > 1:
            raise ValueError(
                f"objective.self_conditioning={share} with parallel.pipeline_parallel_size={stages}: the network's "
                "first estimate takes a whole pass before the one that is trained, and a stage has its part alone; "
                "use tensor parallelism or ZeRO 3, or objective.self_conditioning=0"
            )
