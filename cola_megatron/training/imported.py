"""Published weights as a checkpoint of ours."""

import shutil
from pathlib import Path

from cola_megatron.config import load_config, resolve_config
from cola_megatron.errors import UserError
from cola_megatron.interop.published import TOKENIZER, read_published
from cola_megatron.training.checkpoint import TENSORS, write_state
from cola_megatron.training.engine_state import WEIGHTS
from cola_megatron.training.sharded_tensors import Piece, write_index, write_pieces
from cola_megatron.training.versions import versions


def import_published(published: Path, output: Path, source: str, overrides: list[str]) -> Path:
    """Writes a checkpoint folder without optimiser state, the form `read_weights` takes, and the tokenizer.

    Stage 2 starts from it, a run does not resume from it. The model section comes from the published folder, the
    others from `source`.

    Raises:
        PublishedError, ConfigError: either side is not what it should be. UserError: `output` exists.
    """
    if output.exists():
        raise UserError(f"{output} exists; give a new folder")
    model, weights = read_published(published)
    tree = load_config(source, overrides).model_dump(mode="json")
    tree["model"] = model.model_dump(mode="json")
    if (published / TOKENIZER).is_file():
        tree["data"]["path"] = str(output.absolute())
    config = resolve_config(tree)
    unfinished = output.with_name(f".importing_{output.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / TENSORS).mkdir(parents=True)
    pieces = (
        Piece(f"{WEIGHTS}{name}", tuple(tensor.shape), (0,) * tensor.dim(), tensor) for name, tensor in weights.items()
    )
    write_index(unfinished / TENSORS, write_pieces(unfinished / TENSORS, "imported", pieces))
    if (published / TOKENIZER).is_file():
        shutil.copyfile(published / TOKENIZER, unfinished / TOKENIZER)
    state = {"step": 0, "imported_from": str(published), "versions": versions()}
    write_state(unfinished, {**state, "config": config.model_dump(mode="json")})
    unfinished.rename(output)
    return output
