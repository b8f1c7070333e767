"""Cola DLM as a chain of parts: the steps that hold parameters, in the order in which training runs them.

Here are parameters and multiply-adds; `activations.py` and `tensor_traffic.py` have the bytes. The labels are those of
the steps of `chain.py`, so that a cost meets its step by position and by name.
"""

from collections.abc import Sequence
from dataclasses import replace

from cola_megatron.config import ColaConfig, DiTConfig, VAEConfig
from cola_megatron.costs.part import Part, RingUnits, causal_pairs, pairs_in_products, two_copy_pairs
from cola_megatron.families.cola.activations import exchanged, gathered_input, part_activations, reference_work
from cola_megatron.families.cola.copies import distinct_times, two_copy_positions
from cola_megatron.families.cola.tensor_traffic import ring_units


def chain_parts(config: ColaConfig, train_vae: bool | None = None) -> tuple[Part, ...]:
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
    return _with_bytes(config, parts)


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


def _encoder(config: ColaConfig, views: int, backward: bool) -> tuple[Part, ...]:
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
            layer_matrices=((width, patch * width),),
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
        layer_matrices=(*[(width, width)] * 4, *[(inner // 2, width)] * 2, (width, inner // 2)),
    )


def _decoder_head(config: ColaConfig, views: int, runs: bool) -> Part:
    vae, vocabulary = config.model.vae, config.model.vocab_size
    width, patch = vae.hidden_size, vae.patch_size
    return Part(
        "vae.decoder.head",
        (width + 1) * patch * width + 2 * width + (width + vae.bias) * vocabulary,
        2 * width,
        views * config.latent_length * (patch * width * width + patch * width * vocabulary),
        forward=runs,
        backward=runs,
        layer_matrices=((patch * width, width),),
    )


def _dit(config: ColaConfig) -> list[Part]:
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
        layer_matrices=(*[(inner, width)] * 3, (width, inner), (ffn, width), (width, ffn)),
    )


def _with_bytes(config: ColaConfig, parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts with what they keep, send and compute beside their multiply-adds; alike for all parts of a label."""
    found: dict[str, Part] = {}
    for part in parts:
        if part.label not in found:
            activations = part_activations(config, part.label)
            if part.label == "reference":
                activations = replace(activations, elementwise=reference_work(config))
            forward, backward = ring_units(config, part.label)
            found[part.label] = replace(
                part,
                computed_pairs=_computed_pairs(config, part.label),
                largest_matrix=_largest_matrix(config, part.label),
                gathered_input=gathered_input(config, part.label),
                activations=activations,
                ring_units=RingUnits(forward, backward),
                exchanged=exchanged(config, part.label),
            )
    return tuple(found[part.label] for part in parts)


def _computed_pairs(config: ColaConfig, label: str) -> float:
    length = config.latent_length
    if label == "dit.block":
        block, chunk = config.model.dit.block_size, config.training.attention_chunk or 0
        return pairs_in_products(length, block, chunk) / two_copy_pairs(length, block)
    block = config.model.vae.block_size
    # A plainly causal product skips what it hides; one with a mask tensor does not.
    return 1.0 if block == 1 and not config.data.document_attention else 2 * length / (length + block)


def _largest_matrix(config: ColaConfig, label: str) -> float:
    """A table of the vocabulary, or the widest matrix of a block."""
    model, ranks = config.model, config.parallel.tensor_parallel_size
    if label in ("vae.encoder.embed", "vae.decoder.head"):
        return model.vocab_size * model.vae.hidden_size / ranks
    network = model.dit if label.startswith("dit.") else model.vae
    return network.hidden_size * network.ffn_hidden_size / ranks
