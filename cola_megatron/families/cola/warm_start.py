"""What stage 2 starts from: the VAE of a stage-1 run, or VAE and prior of a published or an earlier model.

The encoder of either is also the frozen reference.
"""

import logging

import torch
from torch import nn

from cola_megatron.checkpoint.load import load_weights
from cola_megatron.config import ColaConfig, ColaModelConfig, ConfigError, DiTConfig, VAEConfig
from cola_megatron.data import require_same_tokenizer
from cola_megatron.errors import UserError
from cola_megatron.families.cola.chain import Cola
from cola_megatron.families.cola.published import PublishedModel, is_published
from cola_megatron.interop.stored_model import CheckpointModel
from cola_megatron.interop.weight_source import ModelSource
from cola_megatron.parallel import ProcessGroups
from cola_megatron.parallel.parameters import shard_of

logger = logging.getLogger(__name__)


def load_starting_weights(model: Cola, config: ColaConfig, groups: ProcessGroups) -> None:
    """Loads into a stage-2 model what `training.stage_one` holds: the VAE, and the prior where there is one.

    Leaves stage 1 and a from-scratch VAE alone.

    Raises:
        ConfigError: no source, an unfinished run, or another architecture (the message names the keys).
        CheckpointError, PublishedError: its files cannot be read.
    """
    if config.stage == 1 or config.training.vae_update.from_scratch:
        return
    if config.training.stage_one is None:
        raise ConfigError(
            "training.stage_one is not set: stage 2 starts from a stage-1 run folder, an imported checkpoint or a "
            "published folder; give training.stage_one=FOLDER, or training.vae_update.from_scratch=true"
        )
    given = config.training.stage_one
    source: PublishedModel | CheckpointModel = PublishedModel(given) if is_published(given) else CheckpointModel(given)
    if isinstance(source, CheckpointModel):
        _check_finished(config, source)
    _check_same(config, source)
    if groups.is_main and config.data.path is not None:
        _warn_of_another_tokenizer(config, source, config.data.path)
    networks: list[tuple[nn.Module | None, str]] = [(model.vae, "vae."), (model.reference, "vae.encoder.")]
    if _has_prior(source):
        networks.append((model.dit, "dit."))
    for module, prefix in networks:
        if module is None:
            continue
        if isinstance(source, PublishedModel):
            _load_published(module, source, prefix, groups)
        else:
            load_weights(module, source.folder, groups, prefix=prefix)


def _check_finished(config: ColaConfig, source: CheckpointModel) -> None:
    given, step, steps = config.training.stage_one, source.step, source.run.training.steps
    if source.folder != given and step < steps:
        raise ConfigError(
            f"training.stage_one={given} stopped at step {step} of {steps}: finish it, or name the checkpoint folder "
            f"itself, training.stage_one={source.folder}"
        )


def _warn_of_another_tokenizer(config: ColaConfig, source: ModelSource, data: str) -> None:
    """A warning alone: a VAE may be trained on with other tokens."""
    try:
        require_same_tokenizer(source.tokenizer, data, config.data.cache_folder)
    except UserError as error:
        logger.warning("training.stage_one=%s knows other tokens: %s", config.training.stage_one, error)


def _check_same(config: ColaConfig, source: ModelSource) -> None:
    ours, theirs, given = config.model, source.config, f"training.stage_one={config.training.stage_one}"
    if not isinstance(theirs, ColaModelConfig):
        raise ConfigError(f"{given} is no Cola DLM: its model.family is {theirs.family}")
    differing = _differing("model.vae", ours.vae, theirs.vae)
    if theirs.vocab_size != ours.vocab_size:
        differing.append(f"model.vocab_size={ours.vocab_size} (there {theirs.vocab_size})")
    if differing:
        raise ConfigError(f"{given} has another VAE: {', '.join(differing)}")
    differing = _differing("model.dit", ours.dit, theirs.dit) if _has_prior(source) else []
    if differing:
        raise ConfigError(
            f"{given} has another prior: {', '.join(differing)}; to start from its VAE alone, "
            "name the cola_vae folder of its export"
        )


def _has_prior(source: ModelSource) -> bool:
    return any(name.startswith("dit.") for name in source.shapes)


def _differing(section: str, ours: VAEConfig | DiTConfig, theirs: VAEConfig | DiTConfig) -> list[str]:
    return [
        f"{section}.{key}={getattr(ours, key)} (there {getattr(theirs, key)})"
        for key in type(ours).model_fields
        if key != "parametrization" and getattr(ours, key) != getattr(theirs, key)
    ]


@torch.no_grad()
def _load_published(module: nn.Module, source: PublishedModel, prefix: str, groups: ProcessGroups) -> None:
    """One tensor at a time; a stage of a pipeline reads its own only."""
    for name, parameter in module.named_parameters():
        parameter.copy_(shard_of(source.read(f"{prefix}{name}"), parameter, groups))
