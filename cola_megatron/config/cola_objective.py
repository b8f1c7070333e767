"""Weights and switches of the losses of Cola DLM (paper section 2)."""

from typing import Annotated, Literal

from pydantic import model_validator

from cola_megatron.config.base import Section
from cola_megatron.config.facts import OURS, PUBLISHED
from cola_megatron.config.types import Float, NonNegativeFloat, PositiveFloat, Share


class VAEObjectiveConfig(Section):
    """-E log p(x|z0) + beta * posterior term + mask_weight * L_mask. Units: nats per token."""

    beta: Annotated[NonNegativeFloat, OURS] = 1e-3
    """Weight of the posterior term. Not published."""
    posterior_term: Annotated[Literal["by_stage", "kl", "entropy"], PUBLISHED] = "by_stage"
    """KL(q || N(0, I)) or E log q(z0|x); by_stage: KL in stage 1, entropy in stage 2, as in the paper."""
    mask_weight: Annotated[NonNegativeFloat, OURS] = 1.0
    """Weight of the masked second view. Not published, but the paper finds weight 1 best."""
    mask_ratio: Annotated[Share, OURS] = 0.15
    """Share of tokens replaced by [MASK] in the second view: exactly round(ratio * length). Not published."""

    @model_validator(mode="after")
    def _consistent(self) -> "VAEObjectiveConfig":
        if self.mask_weight and not self.mask_ratio:
            raise ValueError(f"mask_ratio={self.mask_ratio} masks nothing; set it above 0, or mask_weight=0")
        return self


class TimeConfig(Section):
    """Distribution of the flow time t in [0, 1] (0 is clean)."""

    distribution: Annotated[Literal["logit_normal", "uniform"], PUBLISHED] = "logit_normal"
    """Kind of distribution; `loc` and `scale` belong to `logit_normal`."""
    loc: Annotated[Float, PUBLISHED] = 1.0
    """t = sigmoid(loc + scale n). Published best: 1.0, 1.7, 2.3 for 16, 64, 128 latent channels."""
    scale: Annotated[PositiveFloat, OURS] = 1.0
    """Standard deviation before the sigmoid."""
    per: Annotated[Literal["block", "sample"], PUBLISHED] = "block"
    """One time for every block, as in the blog, or one for the whole sample, as in the released script."""


class FlowConfig(Section):
    """lambda_fm * L_FM of the block-causal prior."""

    weight: Annotated[NonNegativeFloat, OURS] = 1.0
    """lambda_fm: weight of the flow-matching loss. Not published."""
    time: TimeConfig = TimeConfig()
    clean_prefix_probability: Annotated[Share, PUBLISHED] = 0.05
    """Share of blocks that keep a random clean prefix at t = 0 without loss: trains the repaint of a prompt's block."""
    context_dropout: Annotated[Share, OURS] = 0.1
    """Share of noisy blocks that see no clean context: the unconditional branch of guidance. Not published."""


class ColaObjectiveConfig(Section):
    """Stage 1: the VAE terms. Stage 2: vae_weight * VAE terms + flow + reference_weight * KL(q || q_ref)."""

    vae: VAEObjectiveConfig = VAEObjectiveConfig()
    flow: FlowConfig = FlowConfig()
    vae_weight: Annotated[NonNegativeFloat, OURS] = 1.0
    """lambda_VAE of stage 2. Not published."""
    reference_weight: Annotated[NonNegativeFloat, OURS] = 0.01
    """lambda_ref: pull towards the frozen stage-1 encoder. Not published. 0 leaves the reference out."""
