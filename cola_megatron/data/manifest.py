"""The manifest of a prepared folder: what it says, reading it, and comparing the folder's files with it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from cola_megatron.errors import UserError

__all__ = [
    "MANIFEST_NAME",
    "TOKENIZER_NAME",
    "BadShardError",
    "FileRecord",
    "Manifest",
    "MixtureRecord",
    "ShardError",
    "StreamRecord",
    "Verify",
    "file_problems",
    "parse_manifest",
    "read_manifest",
    "sha256_of",
]

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"

Verify = Literal["hash", "size", "none"]


class ShardError(UserError, RuntimeError):
    """A prepared folder, or a file in it, is missing, damaged or not what its manifest says."""


class BadShardError(ShardError):
    """A shard is missing or damaged, and stays so: what training may skip where it is told to."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Record):
    """Size in bytes and SHA-256 (hexadecimal) of one file."""

    bytes: int
    sha256: str


class StreamRecord(_Record):
    """What one source gave to one split."""

    documents: int
    characters: int
    sequences: int
    tokens: int
    """Tokens in the sequences, end-of-text and padding included: sequences * sequence_length."""
    padding_tokens: int
    """Of these, the ones that only fill up."""
    dropped_tokens: int
    """Tokens that did not fill a sequence and were not written."""


class MixtureRecord(_Record):
    """How often training sees one source."""

    epochs: float
    weight: float | None


class Manifest(_Record):
    """`manifest.json` of a prepared folder."""

    layout_version: Literal[2]
    shard_format: Literal["mds", "webdataset"]
    compression: Literal["zstd"] | None
    sequence_length: int
    token_dtype: Literal["uint16", "uint32"]
    vocab_size: int
    """One more than the largest token id of the tokenizer."""
    end_of_text_id: int
    padding_id: int
    mixture: dict[str, MixtureRecord]
    """By the name of the source, in the order of the recipe."""
    splits: dict[str, dict[str, StreamRecord]]
    """By split, then by source; a source that gave nothing to a split is absent there."""
    fingerprint: str
    """Of the recipe and the versions of everything it read: what is asked for again is not done again."""
    recipe: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, FileRecord]
    """Every other file in the folder, by its path relative to the folder, with forward slashes."""

    def total(self, split: str) -> StreamRecord:
        """The streams of a split together."""
        streams = [record.model_dump() for record in self.splits[split].values()]
        return StreamRecord(**{name: sum(each[name] for each in streams) for name in StreamRecord.model_fields})


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``folder/manifest.json``.

    Raises:
        ShardError: there is none, or it cannot be read as one.
    """
    path = folder / MANIFEST_NAME
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        raise ShardError(f"{path} does not exist: not a finished prepared folder; run `cola prep` first") from error
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error.strerror}") from error


def parse_manifest(content: bytes, place: str) -> Manifest:
    """Check what was read from a manifest; raises ShardError, which names the place."""
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ShardError(f"{place} is no valid manifest ({where}: {first['msg']}); prepare the folder again") from error


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_problems(folder: Path, files: dict[str, FileRecord], verify: Verify) -> Iterator[str]:
    """Compare files with what the manifest says of them.

    Args:
        folder: the prepared folder.
        files: the part of `Manifest.files` to check.
        verify: "hash" reads every byte, "size" asks the file system, "none" checks nothing.

    Yields:
        One line per missing or differing file: its path and what is wrong with it.
    """
    if verify == "none":
        return
    for name, record in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != record.bytes:
                yield f"{path} has {size:,} bytes, not {record.bytes:,} as its manifest says"
            elif verify == "hash" and sha256_of(path) != record.sha256:
                yield f"{path} is damaged: its SHA-256 is not the one in the manifest"
        except FileNotFoundError:
            yield f"{path} is missing"
        except OSError as error:
            yield f"{path} cannot be read: {error.strerror}"
