"""Published weights as a checkpoint of ours."""

import json
import shutil
from pathlib import Path

from cola_megatron.config import load_config, resolve_config
from cola_megatron.errors import UserError
from cola_megatron.interop.published import TOKENIZER, read_published
from cola_megatron.interop.tensor_files import write_tensors
from cola_megatron.training.checkpoint import STATE, WEIGHTS
from cola_megatron.training.versions import versions


def import_published(published: Path, output: Path, source: str, overrides: list[str]) -> Path:
    """Writes a folder with state.json and weights.safetensors, the form `read_weights` takes, and the tokenizer.

    It has no optimiser state: stage 2 starts from it, a run does not resume from it. The model section comes from the
    published folder, the others from `source`.

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
    unfinished.mkdir(parents=True)
    write_tensors(unfinished / WEIGHTS, weights)
    if (published / TOKENIZER).is_file():
        shutil.copyfile(published / TOKENIZER, unfinished / TOKENIZER)
    files = {WEIGHTS: (unfinished / WEIGHTS).stat().st_size}
    state = {"step": 0, "imported_from": str(published), "versions": versions(), "files": files}
    (unfinished / STATE).write_text(json.dumps({**state, "config": config.model_dump(mode="json")}, indent=1) + "\n")
    unfinished.rename(output)
    return output
