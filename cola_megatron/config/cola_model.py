"""Architecture of the Text VAE and the DiT of Cola DLM (paper section 3; names as in the field)."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cola_megatron.config.base import Section
from cola_megatron.config.facts import OURS, PUBLISHED
from cola_megatron.config.model import ModelConfig, require_divisor
from cola_megatron.config.parametrization import ParametrizationConfig
from cola_megatron.config.types import NOT_BOOL, Float, PositiveFloat, PositiveInt


class VAEConfig(Section):
    """Text VAE: encoder q(z|x) and decoder p(x|z). Defaults are the published ones, with block size 1."""

    encoder_layers: Annotated[PositiveInt, PUBLISHED] = 4
    """Blocks of the encoder."""
    decoder_layers: Annotated[PositiveInt, PUBLISHED] = 4
    """Blocks of the decoder."""
    hidden_size: Annotated[PositiveInt, PUBLISHED] = 1536
    """Width of encoder and decoder."""
    ffn_hidden_size: Annotated[PositiveInt, PUBLISHED] = 6144
    """Outputs of the first matrix of the feed-forward; SwiGLU halves them into value and gate."""
    num_attention_heads: Annotated[PositiveInt, PUBLISHED] = 12
    """Heads; must divide `hidden_size`."""
    latent_dim: Annotated[PositiveInt, PUBLISHED] = 16
    """Channels d of one latent; must equal model.dit.latent_dim."""
    patch_size: Annotated[PositiveInt, PUBLISHED] = 1
    """Tokens per latent."""
    block_size: Annotated[PositiveInt, PUBLISHED] = 1
    """Block-causal attention over latents: 1 is causal, as in the runs of the paper. The published inference package
    defaults to 4."""
    post_norm: Annotated[bool, PUBLISHED] = True
    """x = norm(x) + attention(x), x = x + norm(ffn(x)); False: the usual pre-norm."""
    norm_eps: Annotated[PositiveFloat, PUBLISHED] = 1e-6
    """Epsilon of every LayerNorm of the VAE."""
    norm_affine: Annotated[bool, PUBLISHED] = True
    """Affine parameters of the attention-branch norm."""
    query_key_norm: Annotated[bool, PUBLISHED] = True
    """LayerNorm over the whole query and key width."""
    query_key_norm_affine: Annotated[bool, PUBLISHED] = True
    """Affine parameters of the query and key norms."""
    qkv_bias: Annotated[bool, PUBLISHED] = False
    """Biases of the query, key and value matrices."""
    bias: Annotated[bool, PUBLISHED] = True
    """Biases of the other matrices."""
    rotary_base: Annotated[PositiveFloat, PUBLISHED] = 500_000.0
    """Base theta of the rotary frequencies."""
    mean_norm: Annotated[bool, PUBLISHED] = True
    """LayerNorm (no affine) over the channels of the posterior mean; a deterministic encoder always has it."""
    variational: Annotated[bool, PUBLISHED] = True
    """Gaussian posterior; False: a deterministic encoder."""
    fixed_logsnr: Annotated[Float | None, PUBLISHED] = None
    """None: the posterior variance is learned. A number s: sigma^2 = mean_d(mu^2) e^-s (paper RQ2: 1.0, 1.5, 2.0)."""
    shifting_factor: Annotated[Float, OURS] = 0.0
    """See `scaling_factor`."""
    scaling_factor: Annotated[Float, OURS] = 1.0
    """The prior and the decoder see (z - shifting_factor) * scaling_factor."""
    init_std: Annotated[PositiveFloat, OURS] = 0.02
    """Standard deviation of the starting weights."""
    init_cutoff_factor: Annotated[PositiveFloat, OURS] = 3.0
    """Weights start from a normal distribution cut at this many standard deviations."""
    parametrization: ParametrizationConfig = ParametrizationConfig()

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @model_validator(mode="after")
    def _consistent(self) -> "VAEConfig":
        require_divisor("num_attention_heads", self.num_attention_heads, "hidden_size", self.hidden_size)
        if self.head_dim % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size}: hidden_size / num_attention_heads = {self.head_dim} must be even for "
                "rotary embedding"
            )
        require_divisor("2", 2, "ffn_hidden_size", self.ffn_hidden_size)
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

    num_layers: Annotated[PositiveInt, PUBLISHED] = 24
    """Blocks."""
    hidden_size: Annotated[PositiveInt, PUBLISHED] = 2048
    """Width."""
    num_attention_heads: Annotated[PositiveInt, PUBLISHED] = 16
    """Heads; their width is `head_dim`, whatever `hidden_size` is."""
    head_dim: Annotated[PositiveInt, PUBLISHED] = 128
    """Channels of one head."""
    ffn_expansion: Annotated[PositiveInt, PUBLISHED] = 4
    """Width inside the feed-forward, in multiples of `hidden_size`."""
    latent_dim: Annotated[PositiveInt, PUBLISHED] = 16
    """Channels d of one latent; must equal model.vae.latent_dim."""
    block_size: Annotated[PositiveInt, PUBLISHED] = 16
    """Latents that are denoised together; attention is causal over blocks."""
    norm_eps: Annotated[PositiveFloat, PUBLISHED] = 1e-5
    """Epsilon of every LayerNorm of the DiT."""
    qkv_bias: Annotated[bool, PUBLISHED] = False
    """Biases of the attention matrices, in and out."""
    rotary_dim: Annotated[PositiveInt, PUBLISHED] = 96
    """Channels of each head that are rotated; the others carry no position."""
    rotary_base: Annotated[PositiveFloat, PUBLISHED] = 10_000.0
    """Base theta of the rotary frequencies."""
    rotary_precision: Annotated[Literal["float32", "bfloat16", "float16"], PUBLISHED] = "float32"
    """Type that the rotary frequencies are rounded to, though angles are always float32: a published model that was
    cast as a whole computes with rounded ones."""
    time_embedding_dim: Annotated[int, Field(gt=0, multiple_of=2), NOT_BOOL, PUBLISHED] = 256
    """Channels of the sinusoid of the time."""
    parametrization: ParametrizationConfig = ParametrizationConfig()

    @property
    def ffn_hidden_size(self) -> int:
        """Width inside the feed-forward."""
        return self.ffn_expansion * self.hidden_size

    @model_validator(mode="after")
    def _consistent(self) -> "DiTConfig":
        if self.rotary_dim > self.head_dim or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim={self.rotary_dim} must be even and at most head_dim={self.head_dim}")
        return self


class ColaModelConfig(ModelConfig):
    """Both levels of the model."""

    family: Annotated[Literal["cola"], OURS] = "cola"
    """Cola DLM: a Text VAE, and over its latents a diffusion prior."""
    vocab_size: Annotated[PositiveInt, PUBLISHED] = 100_278
    """Token ids; the embedding has one more row, for [MASK]. Must equal the shards'."""
    vae: VAEConfig = VAEConfig()
    dit: DiTConfig = DiTConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "ColaModelConfig":
        if self.vae.latent_dim != self.dit.latent_dim:
            raise ValueError(
                f"dit.latent_dim={self.dit.latent_dim} differs from vae.latent_dim={self.vae.latent_dim}; "
                "set both to the same number"
            )
        return self
