"""The tokenizer of a run: kept in its folder and in every checkpoint, and known again by its fingerprint.

What lies at `data.path` later, or in another working directory, need not be what made the tokens of a run.
"""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from cola_megatron.checkpoint.errors import CheckpointError, DamagedCheckpoint
from cola_megatron.checkpoint.state_file import read_config, read_state
from cola_megatron.config import RunConfig
from cola_megatron.data import ShardError, TokenShards, tokenizer_file, tokenizer_fingerprint
from cola_megatron.data.manifest import TOKENIZER_NAME, sha256_of
from cola_megatron.records.run_folder import placed

logger = logging.getLogger(__name__)

_FINGERPRINT = "tokenizer"
"""Key of state.json."""


def keep_tokenizer(config: RunConfig, checkpoint: Path | None, shards: TokenShards) -> None:
    """Copies the tokenizer of the shards to the run folder; the main process calls it, at every start.

    Args:
        checkpoint: what the run goes on from.

    Raises:
        CheckpointError: the checkpoint was trained with another one.
    """
    try:
        file = shards.tokenizer_path
        found = tokenizer_fingerprint(file)
    except OSError as error:  # only where data.verify is none
        logger.warning("%s cannot be read (%s): this run will hold no tokenizer", error.filename, error.strerror)
        return
    if checkpoint is not None and read_state(checkpoint).get(_FINGERPRINT, found) != found:
        raise CheckpointError(
            f"{checkpoint} was trained with another tokenizer than the one in data.path={config.data.path}; give the "
            f"data that it was trained on, or another name= for a new run"
        )
    config.run_folder.mkdir(parents=True, exist_ok=True)
    unfinished = config.run_folder / f".{TOKENIZER_NAME}.{os.getpid()}"
    shutil.copyfile(file, unfinished)
    unfinished.replace(config.run_folder / TOKENIZER_NAME)


def store_tokenizer(source: Path, unfinished: Path) -> dict[str, Any]:
    """Copies a tokenizer.json, where there is one, into a checkpoint; returns what state.json says of it."""
    if not source.is_file():
        return {}
    shutil.copyfile(source, unfinished / TOKENIZER_NAME)
    return {_FINGERPRINT: tokenizer_fingerprint(source)}


def stored_tokenizer(checkpoint: Path) -> Path | None:
    """The tokenizer.json that a checkpoint was trained with; None, and a warning, where none is known.

    That is the one in it; of a checkpoint without one (older versions), the one in its run folder, else the one beside
    its data, if those are the data that it was trained on.

    Raises:
        DamagedCheckpoint: the one in it is another one. CheckpointError, ConfigError: it cannot be read.
    """
    known, own = read_state(checkpoint).get(_FINGERPRINT), checkpoint / TOKENIZER_NAME
    if own.is_file():
        if known is not None and tokenizer_fingerprint(own) != known:
            raise DamagedCheckpoint(
                f"{own} is not the tokenizer that the checkpoint was trained with: put that one back, or remove this"
            )
        return own
    kept = checkpoint.parent.parent / TOKENIZER_NAME
    if kept.is_file() and known in (None, tokenizer_fingerprint(kept)):
        return kept
    return _beside_its_data(checkpoint, known)


def _beside_its_data(checkpoint: Path, known: str | None) -> Path | None:
    config = read_config(checkpoint)
    if config.data.path is None:
        return None
    place = placed(config.data.path, config, checkpoint.parent.parent)
    file = tokenizer_file(place, config.data.cache_folder)
    if file is None:
        return None
    if known is not None:
        same = tokenizer_fingerprint(file) == known
    else:
        try:
            shards = TokenShards(place, "train", "none", cache_folder=config.data.cache_folder)
        except ShardError as error:
            logger.warning("%s: whether %s is its tokenizer cannot be checked (%s)", checkpoint, file, error)
            return file
        record = shards.manifest.files.get(TOKENIZER_NAME)
        same = shards.fingerprint == read_state(checkpoint).get("data_fingerprint", shards.fingerprint)
        same = same and (record is None or record.sha256 == sha256_of(file))
    if not same:
        logger.warning("%s: %s is of other data than it was trained on, and is not used", checkpoint, file)
    return file if same else None
