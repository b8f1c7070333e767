"""A model on disk, whichever family and form it has."""

import json
from pathlib import Path

from cola_megatron.errors import UserError
from cola_megatron.families import FAMILIES
from cola_megatron.interop.stored_model import CheckpointModel
from cola_megatron.interop.weight_source import ModelSource, WeightFormat

CONFIG = "config.json"


def open_model(folder: Path, ema: bool = False) -> ModelSource:
    """A run folder, a checkpoint, or a folder in a layout that a family knows; raises UserError.

    Args:
        ema: the averages of the weights in their place, which only checkpoints have.
    """
    layout = format_of(folder)
    if layout is None:
        return CheckpointModel(folder, ema)
    if ema:
        raise UserError(f"{folder} is an export, which has one set of weights: leave out --ema, or give the run")
    return layout.open(folder)


def format_of(folder: Path) -> WeightFormat | None:
    """The layout of another program that a folder has; None: it is a checkpoint of ours, or nothing.

    Raises:
        UserError: it holds a model that no family knows.
    """
    for family in FAMILIES.values():
        for layout in family.formats:
            if layout.matches(folder):
                return layout
    if (folder / CONFIG).is_file():
        kind = json.loads((folder / CONFIG).read_text()).get("model_type")
        known = ", ".join(layout.name for family in FAMILIES.values() for layout in family.formats)
        raise UserError(f"{folder / CONFIG} has model_type={kind!r}, which no family reads; known are {known}")
    return None
