"""Weights and switches of the losses (paper section 2). What the paper does not publish says so."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, model_validator

from cola_megatron.config.base import Section

Probability = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]


class VAEObjectiveConfig(Section):
    """-E log p(x|z0) + beta * posterior term + mask_weight * L_mask. Units: nats per token."""

    beta: Weight = 1e-3
    """Weight of the posterior term. Not published; ours."""
    posterior_term: Literal["by_stage", "kl", "entropy"] = "by_stage"
    """KL(q || N(0, I)) or E log q(z0|x); by_stage: KL in stage 1, entropy in stage 2, as in the paper."""
    mask_weight: Weight = 1.0
    """Weight of the masked second view. Not published; ours (the paper finds weight 1 best)."""
    mask_ratio: Probability = 0.15
    """Share of tokens replaced by [MASK] in the second view: exactly round(ratio * length). Not published; ours."""

    @model_validator(mode="after")
    def _consistent(self) -> "VAEObjectiveConfig":
        if self.mask_weight and not self.mask_ratio:
            raise ValueError(f"mask_ratio={self.mask_ratio} masks nothing; set it above 0, or mask_weight=0")
        return self


class TimeConfig(Section):
    """Distribution of the flow time t in [0, 1] (0 is clean)."""

    distribution: Literal["logit_normal", "uniform"] = "logit_normal"
    loc: float = 1.0
    """t = sigmoid(loc + scale n). Published best: 1.0, 1.7, 2.3 for 16, 64, 128 latent channels."""
    scale: PositiveFloat = 1.0
    per: Literal["block", "sample"] = "block"
    """One time for every block, or one for the whole sample."""


class FlowConfig(Section):
    """lambda_fm * L_FM of the block-causal prior."""

    weight: Weight = 1.0
    time: TimeConfig = TimeConfig()
    clean_prefix_probability: Probability = 0.05
    """Share of blocks that keep a random clean prefix at t = 0 without loss: trains the repaint of a prompt's block."""
    context_dropout: Probability = 0.1
    """Share of noisy blocks that see no clean context: the unconditional branch of guidance. Not published; ours."""


class ObjectiveConfig(Section):
    """Stage 1: the VAE terms. Stage 2: vae_weight * VAE terms + flow + reference_weight * KL(q || q_ref)."""

    vae: VAEObjectiveConfig = VAEObjectiveConfig()
    flow: FlowConfig = FlowConfig()
    vae_weight: Weight = 1.0
    """lambda_VAE of stage 2. Not published; ours."""
    reference_weight: Weight = 0.01
    """lambda_ref: pull towards the frozen stage-1 encoder. Not published; ours. 0 leaves the reference out."""
