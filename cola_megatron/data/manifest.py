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
    "FileRecord",
    "Manifest",
    "ShardError",
    "SourceRecord",
    "SplitRecord",
    "Verify",
    "file_problems",
    "read_manifest",
    "sha256_of",
]

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"

Verify = Literal["hash", "size", "none"]


class ShardError(UserError, RuntimeError):
    """A prepared folder, or a file in it, is missing, damaged or not what its manifest says."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Record):
    """Size in bytes and SHA-256 (hexadecimal) of one file."""

    bytes: int
    sha256: str


class SourceRecord(_Record):
    """One source that documents were read from."""

    source: str
    """Absolute path of a file, or `embedded`."""
    bytes: int
    """Size of the file, 0 for the embedded corpus."""
    modified_ns: int
    sha256: str
    documents: int
    characters: int


class SplitRecord(_Record):
    """What one split holds."""

    documents: int
    characters: int
    sequences: int
    tokens: int
    """Tokens in the sequences, end-of-text tokens included: sequences * sequence_length."""
    dropped_tokens: int
    """Tokens at the end of the split that did not fill a sequence and were not written."""


class Manifest(_Record):
    """`manifest.json` of a prepared folder."""

    layout_version: Literal[1]
    sequence_length: int
    token_dtype: Literal["uint16", "uint32"]
    vocab_size: int
    """One more than the largest token id of the tokenizer."""
    end_of_text_id: int
    padding_id: int
    empty_documents: int
    """Documents whose text was the empty string; they were left out."""
    splits: dict[str, SplitRecord]
    sources: list[SourceRecord]
    settings: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, FileRecord]
    """Every other file in the folder, by its path relative to the folder, with forward slashes."""


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``folder/manifest.json``.

    Raises:
        ShardError: there is none, or it cannot be read as one.
    """
    path = folder / MANIFEST_NAME
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ShardError(f"{path} does not exist: not a finished prepared folder; run `cola prep` first") from error
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ShardError(f"{path} is no valid manifest ({where}: {first['msg']}); prepare the folder again") from error


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
