"""Files of tokenizers: found beside prepared data, read, and known again by a fingerprint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from cola_megatron.data.folder import PreparedFolder
from cola_megatron.data.manifest import TOKENIZER_NAME, ShardError
from cola_megatron.data.transfer import is_url
from cola_megatron.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["read_tokenizer", "require_same_tokenizer", "tokenizer_file", "tokenizer_fingerprint"]

_OF_BATCHES = ("truncation", "padding")
"""What a tokenizer.json may say about batches of texts: no part of how a text becomes tokens."""


def tokenizer_file(place: str | Path, cache_folder: Path | None = None) -> Path | None:
    """The tokenizer.json of a prepared folder on local disk; None where there is none, or it cannot be reached."""
    if not is_url(place):
        path = Path(place).expanduser() / TOKENIZER_NAME
        return path if path.is_file() else None
    try:
        return PreparedFolder(place, cache_folder).small_file(TOKENIZER_NAME)
    except ShardError:
        return None


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, which cuts no text and pads none, whatever the file says: as in preparation.

    Raises:
        UserError: it cannot be read.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise UserError(f"{path}: not a readable tokenizer.json: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def require_same_tokenizer(tokenizer: Path | None, place: str | Path, cache_folder: Path | None = None) -> None:
    """Refuses data whose token ids mean something else to a model of this tokenizer; nothing where one is not known.

    Raises:
        UserError: they were made with another one.
    """
    theirs = tokenizer_file(place, cache_folder)
    if tokenizer is None or theirs is None:
        return
    if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(theirs):
        raise UserError(
            f"{place} was prepared with another tokenizer than that of the model, {tokenizer}: give data that were "
            "prepared with that one (`tokenizer.path` of the recipe)"
        )


def tokenizer_fingerprint(path: Path) -> str:
    """Equal for files that make the same tokens of a text: the SHA-256 of what is in it, but `_OF_BATCHES`."""
    content = path.read_bytes()
    try:
        fields = json.loads(content)
        told = {name: value for name, value in fields.items() if name not in _OF_BATCHES}
    except (ValueError, AttributeError):  # no tokenizer at all: equal only to itself
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
