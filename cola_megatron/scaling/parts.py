"""The model as a chain of parts: the steps that hold parameters, in the order in which training runs them.

Parameters and multiply-adds are counted from the config alone, for the whole model: no layout enters here. The labels
are those of the models' steps, so that a cost meets its step by position and by name.
"""

from dataclasses import dataclass

from cola_megatron.config import DiTConfig, RunConfig, VAEConfig


@dataclass(frozen=True)
class Part:
    """One step that holds parameters."""

    label: str
    """Part of the model, as in `dit.block`; repeated blocks share it."""
    parameters: int
    """Of the whole model."""
    uncut: int
    """Those of them that tensor parallelism leaves whole on every rank."""
    matrix_macs: float
    """Multiply-adds of the matrix products in one forward pass of one sample, all its views."""
    attention_macs: float = 0.0
    """Multiply-adds of the attention pairs that the mask keeps, likewise."""
    feed_forward_macs: float = 0.0
    """Those of `matrix_macs` that a block spends in its feed-forward."""
    modulation_macs: float = 0.0
    """Those of `matrix_macs` that a block spends in AdaLN."""
    forward: bool = True
    """False: the part does not run in this kind of step."""
    backward: bool = True
    """False: forward only, without gradients."""

    def parameters_on_rank(self, tensor_parallel_size: int) -> float:
        """Parameters of this part on one tensor-parallel rank (padding of the vocabulary left out)."""
        return self.uncut + (self.parameters - self.uncut) / tensor_parallel_size

    @property
    def macs(self) -> float:
        """Multiply-adds of one forward pass of one sample."""
        return (self.matrix_macs + self.attention_macs) if self.forward else 0.0

    @property
    def flops(self) -> float:
        """Training FLOPs of one sample: two per multiply-add, backward twice the forward."""
        return 2.0 * self.macs * (3.0 if self.backward else 1.0)


def chain_parts(config: RunConfig, train_vae: bool | None = None) -> tuple[Part, ...]:
    """One entry for each step that holds parameters, in chain order.

    Stage 1: encoder, decoder. Stage 2: encoder, the frozen reference encoder (one part) where there is one, DiT,
    decoder.

    Args:
        train_vae: False describes a step with a frozen VAE: the encoder runs forward only, reference and decoder not
            at all. None: what the config's first step does.
    """
    if train_vae is None:
        train_vae = config.stage == 1 or config.training.vae_update.mode != "frozen"
    views = 2 if train_vae and config.objective.vae.mask_weight > 0 else 1
    vae, latents = config.model.vae, config.latent_length
    encoder = _encoder(config, views, backward=train_vae)
    parts = list(encoder)
    if config.stage == 2:
        if config.uses_reference:
            parts.append(_reference(_encoder(config, 1, backward=False), runs=train_vae))
        parts += _dit(config)
    block = _text_block(vae, "vae.decoder.block", latents, views, train_vae)
    parts += [
        Part(
            "vae.decoder.embed",
            vae.latent_dim * vae.hidden_size + vae.bias * vae.hidden_size,
            0,
            views * latents * vae.latent_dim * vae.hidden_size,
            forward=train_vae,
            backward=train_vae,
        ),
        *[block] * vae.decoder_layers,
        _decoder_head(config, views, train_vae),
    ]
    return tuple(parts)


def _reference(encoder: tuple[Part, ...], runs: bool) -> Part:
    return Part(
        "reference",
        sum(part.parameters for part in encoder),
        sum(part.uncut for part in encoder),
        sum(part.matrix_macs for part in encoder),
        sum(part.attention_macs for part in encoder),
        forward=runs,
        backward=False,
    )


def _encoder(config: RunConfig, views: int, backward: bool) -> tuple[Part, ...]:
    vae, latents = config.model.vae, config.latent_length
    width, patch = vae.hidden_size, vae.patch_size
    outputs = (2 if vae.variational else 1) * vae.latent_dim
    block = _text_block(vae, "vae.encoder.block", latents, views, runs=True, backward=backward)
    return (
        Part(
            "vae.encoder.embed",
            # The table has one row more than there are tokens: [MASK].
            (config.model.vocab_size + 1) * width + (patch * width + 1) * width,
            0,
            views * latents * patch * width * width,
            backward=backward,
        ),
        *[block] * vae.encoder_layers,
        Part(
            "vae.encoder.head",
            (width + vae.bias) * outputs,
            vae.bias * outputs,
            views * latents * width * outputs,
            backward=backward,
        ),
    )


def _text_block(vae: VAEConfig, label: str, latents: int, views: int, runs: bool, backward: bool | None = None) -> Part:
    width, inner = vae.hidden_size, vae.ffn_hidden_size
    feed_forward = inner * width + inner // 2 * width
    matrices = 4 * width * width + feed_forward
    biases = 3 * width * vae.qkv_bias + (width + inner + width) * vae.bias
    norms = 2 * width * (vae.norm_affine + 1)
    query_key_norms = 2 * 2 * width * (vae.query_key_norm and vae.query_key_norm_affine)
    return Part(
        label,
        matrices + biases + norms + query_key_norms,
        norms + 2 * width * vae.bias,
        views * latents * matrices,
        views * 2 * width * causal_pairs(latents, vae.block_size),
        views * latents * feed_forward,
        forward=runs,
        backward=runs if backward is None else backward,
    )


def _decoder_head(config: RunConfig, views: int, runs: bool) -> Part:
    vae, vocabulary = config.model.vae, config.model.vocab_size
    width, patch = vae.hidden_size, vae.patch_size
    return Part(
        "vae.decoder.head",
        (width + 1) * patch * width + 2 * width + (width + vae.bias) * vocabulary,
        2 * width,
        views * config.latent_length * (patch * width * width + patch * width * vocabulary),
        forward=runs,
        backward=runs,
    )


def _dit(config: RunConfig) -> list[Part]:
    dit, latents = config.model.dit, config.latent_length
    width = dit.hidden_size
    positions, times = two_copy_positions(config), distinct_times(config)
    return [
        Part(
            "dit.time",
            (dit.time_embedding_dim + 1) * width + 2 * (width + 1) * width,
            0,
            times * (dit.time_embedding_dim * width + 2 * width * width),
        ),
        Part("dit.embed", (dit.latent_dim + 1) * width, 0, positions * dit.latent_dim * width),
        *[_dit_block(dit, positions, latents, times)] * dit.num_layers,
        Part(
            "dit.head",
            2 * width + 2 * (width + 1) * width + (width + 1) * dit.latent_dim,
            2 * width + dit.latent_dim,
            times * 2 * width * width + latents * width * dit.latent_dim,
        ),
    ]


def _dit_block(dit: DiTConfig, positions: int, latents: int, times: int) -> Part:
    width, inner, ffn = dit.hidden_size, dit.num_attention_heads * dit.head_dim, dit.ffn_hidden_size
    attention = 4 * width * inner + (3 * inner + width) * dit.qkv_bias + 2 * 2 * dit.head_dim
    feed_forward = 2 * width * ffn + ffn + width
    modulations = 6 * (width + 1) * width
    feed_forward_macs, modulation_macs = positions * 2 * width * ffn, times * 6 * width * width
    return Part(
        "dit.block",
        attention + feed_forward + modulations,
        2 * 2 * dit.head_dim + width * (1 + dit.qkv_bias),
        positions * 4 * width * inner + feed_forward_macs + modulation_macs,
        2 * inner * two_copy_pairs(latents, dit.block_size),
        feed_forward_macs,
        modulation_macs,
    )


def two_copy_positions(config: RunConfig) -> int:
    """Positions of `[clean copy | noisy copy]`: the last clean block is seen by nobody and is left out."""
    return 2 * config.latent_length - config.model.dit.block_size


def distinct_times(config: RunConfig) -> int:
    """Times of one sample at which the modulations are evaluated (t = 0, shared by a whole batch, is not counted)."""
    return config.latent_length // config.model.dit.block_size if config.objective.flow.time.per == "block" else 1


def causal_pairs(length: int, block_size: int) -> float:
    """Pairs (query, key) that block-causal attention keeps."""
    blocks = length / block_size
    return block_size * block_size * blocks * (blocks + 1) / 2


def two_copy_pairs(length: int, block_size: int) -> float:
    """Pairs kept over `[clean copy | noisy copy]`: clean to clean, noisy to earlier clean, noisy to its own block."""
    blocks = length // block_size
    noisy_blocks = blocks * (blocks - 1) / 2 + blocks
    return causal_pairs(length - block_size, block_size) + block_size * block_size * noisy_blocks
