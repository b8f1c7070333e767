"""A trained model in one process, from whatever folder: for notebooks and for the command line."""

from pathlib import Path
from typing import Any

from cola_megatron.conversion.open_model import open_model
from cola_megatron.families import FAMILIES
from cola_megatron.families.cola.cola_dlm import ColaDLM
from cola_megatron.inference.text_model import TextModel

__all__ = ["ColaDLM", "load_model"]


def load_model(folder: str | Path, ema: bool = False, **options: Any) -> TextModel:
    """The model of any family in a run, a checkpoint, or an export in a layout that its family knows.

    Args:
        ema: the averages of the weights in their place, where the run kept them (`training.ema_decay`).
        options: `device`, `dtype`, `tensor_parallel_size`, and what the family adds.

    Returns:
        a generator: `generate`, `stream`, `log_likelihood`; for the families of tokens also `logits`.

    Raises:
        UserError: the folder is no model, or is damaged, or has no averages.
    """
    source = open_model(Path(folder), ema)
    return FAMILIES[source.config.family].load(source, **options)
