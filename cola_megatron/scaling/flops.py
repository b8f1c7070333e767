"""FLOPs of training, counted from the config: two per multiply-add, backward twice the forward.

Counted are the matrices, the attention scores that the masks keep, and nothing elementwise. Recomputation is not
counted: it is a way of running, not of the model.
"""

from cola_megatron.config import DiTConfig, RunConfig, VAEConfig


def paper_nominal_flops(backbone_parameters: float, tokens: int) -> float:
    """6 N D, the paper's compute axis (N = 1.8e9 for the published model)."""
    return 6.0 * backbone_parameters * tokens


def training_flops_per_sample(config: RunConfig, train_vae: bool = True) -> float:
    """FLOPs of one sample through one optimiser step of the config's stage."""
    vae, latents = config.model.vae, config.latent_length
    encoder = encoder_macs(vae, latents)
    if not train_vae:
        forward_only, trained = encoder, 0.0
    else:
        views = 2 if config.objective.vae.mask_weight > 0 else 1
        forward_only = encoder if config.uses_reference else 0.0
        trained = views * (encoder + decoder_macs(vae, config.model.vocab_size, latents))
    if config.stage == 2:
        times = latents // config.model.dit.block_size if config.objective.flow.time.per == "block" else 1
        trained += two_copy_macs(config.model.dit, latents, times)
    return 2.0 * (forward_only + 3.0 * trained)


def training_flops(config: RunConfig, steps: int) -> float:
    """FLOPs of the first `steps` optimiser steps, frozen steps counted as such."""
    update = config.training.vae_update
    if config.stage == 1 or update.mode == "joint":
        joint = steps
    elif update.mode == "frozen":
        joint = 0
    else:
        period = update.joint_steps + update.frozen_steps
        joint = steps // period * update.joint_steps + min(steps % period, update.joint_steps)
    per_sample = joint * training_flops_per_sample(config, True)
    if steps > joint:
        per_sample += (steps - joint) * training_flops_per_sample(config, False)
    return config.training.global_batch_size * per_sample


def encoder_macs(config: VAEConfig, latents: int) -> float:
    """Multiply-adds of one sequence through the encoder."""
    width = config.hidden_size
    outputs = (2 if config.variational else 1) * config.latent_dim
    ends = latents * (config.patch_size * width * width + width * outputs)
    return ends + config.encoder_layers * _text_block_macs(config, latents)


def decoder_macs(config: VAEConfig, vocab_size: int, latents: int) -> float:
    """Multiply-adds of one sequence through the decoder and the vocabulary head."""
    width, patch = config.hidden_size, config.patch_size
    ends = latents * (config.latent_dim * width + patch * width * width + patch * width * vocab_size)
    return ends + config.decoder_layers * _text_block_macs(config, latents)


def two_copy_macs(config: DiTConfig, latents: int, distinct_times: int) -> float:
    """Multiply-adds of one sequence through `[clean | noisy]`; modulations once per distinct time."""
    width, inner, block = config.hidden_size, config.num_attention_heads * config.head_dim, config.block_size
    clean = latents - block
    matrices = (clean + latents) * (4 * width * inner + 2 * width * config.ffn_hidden_size)
    blocks, clean_blocks = latents // block, clean // block
    clean_pairs = block * block * clean_blocks * (clean_blocks + 1) / 2
    noisy_pairs = block * block * (blocks * (blocks - 1) / 2 + blocks)
    attention = 2 * inner * (clean_pairs + noisy_pairs)
    modulation = 6 * width * width * distinct_times
    time_embedding = distinct_times * (config.time_embedding_dim * width + 2 * width * width)
    ends = (clean + latents) * config.latent_dim * width + latents * width * config.latent_dim
    ends += 2 * width * width * distinct_times
    return config.num_layers * (matrices + attention + modulation) + time_embedding + ends


def _text_block_macs(config: VAEConfig, latents: int) -> float:
    width, block = config.hidden_size, config.block_size
    blocks = latents / block
    pairs = block * block * blocks * (blocks + 1) / 2
    matrices = latents * (4 * width * width + 1.5 * width * config.ffn_hidden_size)
    return matrices + 2 * width * pairs
