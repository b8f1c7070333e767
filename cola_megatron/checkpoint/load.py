"""From a checkpoint into a model, into an engine, or as plain tensors."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cola_megatron.checkpoint.pieces import EMA_UPDATES, WEIGHTS, TrainingState, pieces_to_load, weight_pieces
from cola_megatron.checkpoint.state_file import open_tensors, read_config, read_state
from cola_megatron.config import RunConfig
from cola_megatron.parallel import ProcessGroups
from cola_megatron.parallel.consensus import together

logger = logging.getLogger(__name__)


def load_weights(module: nn.Module, checkpoint: Path, groups: ProcessGroups, prefix: str = "") -> None:
    """Fills a module, or this rank's part of one, that no engine has taken over yet; all ranks call it.

    Args:
        prefix: what the names in the checkpoint have before those in the module: "vae." for a VAE alone.

    Raises:
        CheckpointError: missing or damaged files, or another model; on every rank.
    """
    together(groups, lambda: open_tensors(checkpoint).fill(weight_pieces(module, groups, prefix)))


def load_optimizer(engine: TrainingState, checkpoint: Path) -> None:
    """Gives an engine over a model from `load_weights` the exact float32 masters, and what else its optimiser holds.

    An average that the checkpoint does not have begins at its weights; one that the engine does not keep is left out.
    Either is logged.

    Raises:
        CheckpointError: missing or damaged files; on every rank.
    """

    def load() -> tuple[int, bool]:
        state = read_state(checkpoint)
        has_average = EMA_UPDATES in state
        engine.skipped_updates = divergence_of(checkpoint).get("skipped_updates", 0)
        steps = state["step"] - engine.skipped_updates
        open_tensors(checkpoint).fill(pieces_to_load(engine, steps, engine.ema if has_average else None))
        if engine.ema is not None and has_average:
            engine.ema.updates = state[EMA_UPDATES]
        elif engine.ema is not None:
            engine.ema.begin()
        return state["step"], has_average

    for step, has_average in together(engine.groups, load)[:1]:  # the main process says it
        if has_average and engine.ema is None:
            logger.warning("training.ema_decay=null: the average of the weights in %s is left out", checkpoint)
        elif engine.ema is not None and not has_average:
            logger.warning("the average of the weights begins at step %d: %s has none", step, checkpoint)


def divergence_of(checkpoint: Path) -> dict[str, Any]:
    """What `training.divergence.Divergence` gave to a checkpoint; raises CheckpointError."""
    return read_state(checkpoint).get("divergence", {})


def read_weights(checkpoint: Path) -> tuple[RunConfig, dict[str, torch.Tensor]]:
    """The config and the whole float32 weights of a checkpoint but the reference encoder's, without an engine.

    Raises:
        CheckpointError: missing or damaged files. ConfigError: as `read_config`.
    """
    config, stored = read_config(checkpoint), open_tensors(checkpoint)
    names = [name for name in stored.shapes if name.startswith(WEIGHTS)]
    return config, {
        name.removeprefix(WEIGHTS): stored.read(name) for name in names if not name.startswith(f"{WEIGHTS}reference.")
    }
