"""What stage 2 starts from: the VAE of a stage-1 run, or a published one, also as the frozen reference."""

from pathlib import Path

import torch

from cola_megatron.config import ConfigError, RunConfig, VAEConfig
from cola_megatron.interop.published import CONFIG, VAE_FOLDER, read_published_vae
from cola_megatron.models.cola import Cola
from cola_megatron.parallel import ProcessGroups, load_full_state_dict
from cola_megatron.training.checkpoint import read_state, read_weights, require_checkpoint


def load_starting_weights(model: Cola, config: RunConfig, groups: ProcessGroups) -> None:
    """Loads the stage-1 VAE into a stage-2 model; leaves stage 1 and a from-scratch VAE alone.

    Raises:
        ConfigError: no stage-1 source, or one of another architecture (the message names the keys).
    """
    if config.stage == 1 or config.training.vae_update.from_scratch:
        return
    source = config.training.stage_one
    if source is None:
        raise ConfigError(
            "training.stage_one is not set: stage 2 starts from a stage-1 run folder or a published cola_vae folder; "
            "give training.stage_one=FOLDER, or training.vae_update.from_scratch=true"
        )
    vae, vocab_size, state = _read_vae(source)
    differing = [
        f"model.vae.{key}={getattr(config.model.vae, key)} (there {getattr(vae, key)})"
        for key in VAEConfig.model_fields
        if getattr(config.model.vae, key) != getattr(vae, key)
    ]
    if vocab_size != config.model.vocab_size:
        differing.append(f"model.vocab_size={config.model.vocab_size} (there {vocab_size})")
    if differing:
        raise ConfigError(f"training.stage_one={source} has another VAE: {', '.join(differing)}")
    load_full_state_dict(model.vae, state, groups)
    if model.reference is not None:
        encoder = {
            name.removeprefix("encoder."): tensor for name, tensor in state.items() if name.startswith("encoder.")
        }
        load_full_state_dict(model.reference, encoder, groups)


def _read_vae(source: Path) -> tuple[VAEConfig, int, dict[str, torch.Tensor]]:
    if (source / CONFIG).is_file():
        return read_published_vae(source)
    if (source / VAE_FOLDER / CONFIG).is_file():
        return read_published_vae(source / VAE_FOLDER)
    checkpoint = require_checkpoint(source)
    config, weights = read_weights(checkpoint)
    step, steps = read_state(checkpoint)["step"], config.training.steps
    if checkpoint != source and step < steps:
        raise ConfigError(
            f"training.stage_one={source} stopped at step {step} of {steps}: finish it, or name the checkpoint folder "
            f"itself, training.stage_one={checkpoint}"
        )
    state = {name.removeprefix("vae."): tensor for name, tensor in weights.items() if name.startswith("vae.")}
    return config.model.vae, config.model.vocab_size, state
