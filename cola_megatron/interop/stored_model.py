"""A checkpoint as a model on disk: opened, checked, and read one tensor at a time."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cola_megatron.checkpoint.find import require_checkpoint
from cola_megatron.checkpoint.pieces import EMA, EMA_UPDATES, WEIGHTS
from cola_megatron.checkpoint.state_file import open_tensors, read_config, read_state
from cola_megatron.checkpoint.tokenizer import stored_tokenizer
from cola_megatron.config import ModelConfig, RunConfig
from cola_megatron.errors import UserError

logger = logging.getLogger(__name__)

FORMS = "published"
"""Key of state.json: how the model was written where it was imported from. Trained checkpoints have none."""


class CheckpointModel:
    """The weights of a checkpoint, or of a run's newest one, without what only training needs. It is a `ModelSource`.

    Args:
        ema: the averages of the trained weights in their place (`training.ema_decay`), which is logged.

    Raises:
        CheckpointError: there is none, or it is damaged. ConfigError: a newer version wrote its config. UserError: it
            has no averages.
    """

    def __init__(self, folder: Path, ema: bool = False):
        self.folder = require_checkpoint(folder)
        state = read_state(self.folder)
        self.step: int = state["step"]
        self.run: RunConfig = read_config(self.folder)
        self.config: ModelConfig = self.run.model
        self.imported: Mapping[str, Any] | None = state.get(FORMS)
        stored = open_tensors(self.folder).shapes
        self.shapes = {
            name.removeprefix(WEIGHTS): shape
            for name, shape in stored.items()
            if name.startswith(WEIGHTS) and not name.startswith(f"{WEIGHTS}reference.")
        }
        self._averaged = {name for name in self.shapes if ema and f"{EMA}{name}" in stored}
        if ema:
            if EMA_UPDATES not in state:
                raise UserError(f"{self.folder} has no averages of its weights: train with training.ema_decay=0.999")
            logger.warning("%s: averages of the weights over %d updates", self.folder, state[EMA_UPDATES])
        self.tokenizer = stored_tokenizer(self.folder)
        if self.run.data.document_attention:
            logger.warning(
                "%s was trained with data.document_attention=true; generation, likelihoods and an export know no "
                "documents: give each document by itself",
                self.folder,
            )

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor: float32, on the CPU; raises CheckpointError.

        The files are mapped anew each time: what was read through a mapping counts as memory while it is kept.
        """
        return open_tensors(self.folder).read(f"{EMA if name in self._averaged else WEIGHTS}{name}")
