"""What stage 2 starts from: the VAE of a stage-1 run, or a published one, also as the frozen reference."""

from pathlib import Path

import torch
from torch import nn

from cola_megatron.config import ConfigError, RunConfig, VAEConfig, resolve_config
from cola_megatron.interop.published import CONFIG, VAE_FOLDER, read_published_vae
from cola_megatron.models.cola import Cola
from cola_megatron.parallel import ProcessGroups, load_full_state_dict
from cola_megatron.training.checkpoint import load_weights, read_state, require_checkpoint

ENCODER = "encoder."


def load_starting_weights(model: Cola, config: RunConfig, groups: ProcessGroups) -> None:
    """Loads the stage-1 VAE into a stage-2 model; leaves stage 1 and a from-scratch VAE alone.

    Raises:
        ConfigError: no stage-1 source, or one of another architecture (the message names the keys).
        CheckpointError, PublishedError: its files cannot be read.
    """
    if config.stage == 1 or config.training.vae_update.from_scratch:
        return
    source = config.training.stage_one
    if source is None:
        raise ConfigError(
            "training.stage_one is not set: stage 2 starts from a stage-1 run folder or a published cola_vae folder; "
            "give training.stage_one=FOLDER, or training.vae_update.from_scratch=true"
        )
    published = next((folder for folder in (source, source / VAE_FOLDER) if (folder / CONFIG).is_file()), None)
    if published is not None:
        vae, vocab_size, state = read_published_vae(published)
    else:
        checkpoint = _finished_checkpoint(source)
        there = resolve_config(read_state(checkpoint)["config"]).model
        vae, vocab_size = there.vae, there.vocab_size
    _check_same_vae(config, vae, vocab_size)
    for module, inside in ((model.vae, ""), (model.reference, ENCODER)):
        if module is None:
            continue
        if published is not None:
            _load_published(module, state, inside, groups)
        else:
            load_weights(module, checkpoint, groups, prefix=f"vae.{inside}")


def _finished_checkpoint(source: Path) -> Path:
    checkpoint = require_checkpoint(source)
    state = read_state(checkpoint)
    step, steps = state["step"], state["config"]["training"]["steps"]
    if checkpoint != source and step < steps:
        raise ConfigError(
            f"training.stage_one={source} stopped at step {step} of {steps}: finish it, or name the checkpoint folder "
            f"itself, training.stage_one={checkpoint}"
        )
    return checkpoint


def _check_same_vae(config: RunConfig, vae: VAEConfig, vocab_size: int) -> None:
    differing = [
        f"model.vae.{key}={getattr(config.model.vae, key)} (there {getattr(vae, key)})"
        for key in VAEConfig.model_fields
        if getattr(config.model.vae, key) != getattr(vae, key)
    ]
    if vocab_size != config.model.vocab_size:
        differing.append(f"model.vocab_size={config.model.vocab_size} (there {vocab_size})")
    if differing:
        raise ConfigError(f"training.stage_one={config.training.stage_one} has another VAE: {', '.join(differing)}")


def _load_published(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, groups: ProcessGroups) -> None:
    own = {f"{prefix}{name}": name for name, _ in module.named_parameters()}  # a stage of a pipeline has not all
    load_full_state_dict(module, {own[name]: tensor for name, tensor in state.items() if name in own}, groups)
