"""Architecture of the Text VAE and the DiT (paper section 3; names as in the field)."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from cola_megatron.config.base import Section


def _divides(small_name: str, small: int, large_name: str, large: int) -> None:
    if large % small:
        raise ValueError(f"{large_name}={large} must be divisible by {small_name} ({small})")


class VAEConfig(Section):
    """Text VAE: encoder q(z|x) and decoder p(x|z). Defaults are the published ones, with block size 1."""

    encoder_layers: PositiveInt = 4
    decoder_layers: PositiveInt = 4
    hidden_size: PositiveInt = 1536
    ffn_hidden_size: PositiveInt = 6144
    """Outputs of the first matrix of the feed-forward; SwiGLU halves them into value and gate."""
    num_attention_heads: PositiveInt = 12
    latent_dim: PositiveInt = 16
    """Channels d of one latent; must equal model.dit.latent_dim."""
    patch_size: PositiveInt = 1
    """Tokens per latent."""
    block_size: PositiveInt = 1
    """Block-causal attention over latents: 1 is causal. The published inference package defaults to 4."""
    post_norm: bool = True
    """x = norm(x) + attention(x), x = x + norm(ffn(x)); False: the usual pre-norm."""
    norm_eps: PositiveFloat = 1e-6
    norm_affine: bool = True
    """Affine parameters of the attention-branch norm."""
    query_key_norm: bool = True
    """LayerNorm over the whole query and key width."""
    query_key_norm_affine: bool = True
    qkv_bias: bool = False
    bias: bool = True
    """Biases of the other matrices."""
    rotary_base: PositiveFloat = 500_000.0
    mean_norm: bool = True
    """LayerNorm (no affine) over the channels of the posterior mean; a deterministic encoder always has it."""
    variational: bool = True
    """Gaussian posterior; False: a deterministic encoder."""
    fixed_logsnr: float | None = None
    """None: the posterior variance is learned. A number s: sigma^2 = mean_d(mu^2) e^-s (paper RQ2: 1.0, 1.5, 2.0)."""
    shifting_factor: float = 0.0
    scaling_factor: float = 1.0
    """The prior and the decoder see (z - shifting_factor) * scaling_factor."""
    init_std: PositiveFloat = 0.02
    init_cutoff_factor: PositiveFloat = 3.0
    """Weights start from a normal distribution cut at this many standard deviations."""

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @model_validator(mode="after")
    def _consistent(self) -> "VAEConfig":
        _divides("num_attention_heads", self.num_attention_heads, "hidden_size", self.hidden_size)
        if self.head_dim % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size}: hidden_size / num_attention_heads = {self.head_dim} must be even for "
                "rotary embedding"
            )
        _divides("2", 2, "ffn_hidden_size", self.ffn_hidden_size)
        if self.fixed_logsnr is not None and not self.variational:
            raise ValueError(f"fixed_logsnr={self.fixed_logsnr} needs variational=true")
        if self.latent_dim == 1 and (self.mean_norm or not self.variational):
            raise ValueError(
                "latent_dim=1: the norm of one channel is always 0; use at least 2, or mean_norm=false with "
                "variational=true"
            )
        return self


class DiTConfig(Section):
    """Block-causal diffusion transformer, the prior over latents. Defaults are the published ones."""

    num_layers: PositiveInt = 24
    hidden_size: PositiveInt = 2048
    num_attention_heads: PositiveInt = 16
    head_dim: PositiveInt = 128
    ffn_expansion: PositiveInt = 4
    latent_dim: PositiveInt = 16
    """Channels d of one latent; must equal model.vae.latent_dim."""
    block_size: PositiveInt = 16
    """Latents that are denoised together; attention is causal over blocks."""
    norm_eps: PositiveFloat = 1e-5
    qkv_bias: bool = False
    """Biases of the attention matrices, in and out."""
    rotary_dim: PositiveInt = 96
    """Channels of each head that are rotated; the others carry no position."""
    rotary_base: PositiveFloat = 10_000.0
    rotary_precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type that the rotary frequencies are rounded to, though angles are always float32: a published model that was
    cast as a whole computes with rounded ones."""
    time_embedding_dim: Annotated[int, Field(gt=0, multiple_of=2)] = 256

    @property
    def ffn_hidden_size(self) -> int:
        """Width inside the feed-forward."""
        return self.ffn_expansion * self.hidden_size

    @model_validator(mode="after")
    def _consistent(self) -> "DiTConfig":
        if self.rotary_dim > self.head_dim or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim={self.rotary_dim} must be even and at most head_dim={self.head_dim}")
        return self


class ModelConfig(Section):
    """Both levels of the model."""

    vocab_size: PositiveInt = 100_278
    vae: VAEConfig = VAEConfig()
    dit: DiTConfig = DiTConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.vae.latent_dim != self.dit.latent_dim:
            raise ValueError(
                f"dit.latent_dim={self.dit.latent_dim} differs from vae.latent_dim={self.vae.latent_dim}; "
                "set both to the same number"
            )
        return self
