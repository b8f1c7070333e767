"""Weights in the layout of another program as a checkpoint of ours."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cola_megatron.checkpoint.pieces import WEIGHTS
from cola_megatron.checkpoint.sharded_tensors import Piece, write_index, write_pieces
from cola_megatron.checkpoint.state_file import TENSORS, write_state
from cola_megatron.checkpoint.tokenizer import store_tokenizer
from cola_megatron.config import RunConfig, dump_config, load_config, preset_names, resolve_config, stored_tree
from cola_megatron.conversion.open_model import format_of
from cola_megatron.errors import UserError
from cola_megatron.families import FAMILIES
from cola_megatron.interop.errors import PublishedError
from cola_megatron.interop.stored_model import FORMS
from cola_megatron.interop.weight_source import ModelSource
from cola_megatron.records.provenance import versions
from cola_megatron.records.run_folder import CONFIG


def import_weights(
    published: Path, output: Path, source: str | None, overrides: list[str], progress: bool = True
) -> ModelSource:
    """Writes a checkpoint folder without optimiser state, with the tokenizer and a config.yaml to train on with.

    Stage 2 starts from it (`training.stage_one`) under any layout; a run does not resume from it. The model section
    comes from the published folder, the others from `source`; without a prior, it is the checkpoint of a stage 1. Needs
    memory for one file of the checkpoint and one tensor.

    Args:
        source: preset or file for all but the model section; None: `paper-2b` of the family.

    Returns:
        what was read.

    Raises:
        PublishedError, ConfigError: either side is not what it should be. UserError: `output` exists.
    """
    if output.exists():
        raise UserError(f"{output} exists; give a new folder")
    layout = format_of(published)
    if layout is None:
        raise PublishedError(f"{published} is in no layout that a family reads")
    model = layout.open(published)
    if source is None:
        source = next(name for name in preset_names(model.config.family) if name.startswith("paper-2b"))
    config = _config(model, load_config(source, overrides).model_dump(mode="json"), output)
    unfinished = output.with_name(f".importing_{output.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / TENSORS).mkdir(parents=True)

    def pieces() -> Iterator[Piece]:
        for name, shape in tqdm(model.shapes.items(), disable=not progress, unit="tensor", desc="import"):
            yield Piece(f"{WEIGHTS}{name}", shape, (0,) * len(shape), model.read(name))

    write_index(unfinished / TENSORS, write_pieces(unfinished / TENSORS, "imported", pieces()))
    tokenizer = {} if model.tokenizer is None else store_tokenizer(model.tokenizer, unfinished)
    (unfinished / CONFIG).write_text(dump_config(config))
    state = {"step": 0, "imported_from": str(published), FORMS: model.imported, "versions": versions()}
    write_state(unfinished, {**state, **tokenizer, "config": stored_tree(config)})
    unfinished.rename(output)
    return model


def _config(model: ModelSource, tree: dict[str, Any], output: Path) -> RunConfig:
    tree = FAMILIES[model.config.family].tree_of_import(model, tree)
    if model.tokenizer is not None:
        tree["data"]["path"] = str(output.absolute())
    return resolve_config(tree)
