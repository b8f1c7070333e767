"""The two formats of shards: how an index names them, and one sequence out of a file."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cola_megatron.data.manifest import Manifest
from cola_megatron.data.streaming_backend import FileInfo, MDSReader

__all__ = [
    "INDEX_NAME",
    "TAR_BLOCK",
    "TAR_RECORD",
    "TOKENS_COLUMN",
    "Shard",
    "ShardReader",
    "shard_reader",
    "tokens_encoding",
]

INDEX_NAME = "index.json"
TOKENS_COLUMN = "tokens"
TAR_BLOCK, TAR_RECORD = 512, 10_240
TAR_MEMBER = re.compile(rb"[0-9]{9}\.npy\0+")


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard as its index describes it."""

    file: str
    """Relative to the folder of the split: the compressed one where there is one."""
    samples: int
    raw_bytes: int
    """Size before compression."""


class ShardReader(Protocol):
    """One format of shards, for sequences of one length and type."""

    name: str

    def shards(self, index: Any) -> Iterator[Shard]:
        """The shards that an index.json lists.

        Raises:
            KeyError, TypeError, ValueError: the index is of another form, or its shards are of other sequences.
        """

    def read(self, path: Path, samples: int, row: int) -> np.ndarray:
        """Sequence number `row` of a shard of so many, (sequence_length,), read-only.

        Raises:
            OSError, ValueError, IndexError, OverflowError, MemoryError: the file cannot be read, or is damaged.
        """


def shard_reader(manifest: Manifest) -> ShardReader:
    """The reader of a folder's shards."""
    kind = _MDS if manifest.shard_format == "mds" else _Tars
    return kind(manifest.sequence_length, manifest.token_dtype)


def tokens_encoding(token_dtype: str, sequence_length: int) -> str:
    """MDS encoding of the tokens column: values only, as type and shape are fixed."""
    return f"ndarray:{token_dtype}:{sequence_length}"


class _MDS:
    """mosaicml-streaming's format, read with its reader, which opens the file for each sequence."""

    name = "MDS"

    def __init__(self, sequence_length: int, token_dtype: str) -> None:
        self.dtype = np.dtype(token_dtype)
        self.bytes = sequence_length * self.dtype.itemsize
        self.columns: dict[str, Any] = {
            "column_names": [TOKENS_COLUMN],
            "column_encodings": [tokens_encoding(token_dtype, sequence_length)],
            "column_sizes": [self.bytes],
        }

    def shards(self, index: Any) -> Iterator[Shard]:
        for entry in index["shards"]:
            if (entry["version"], entry["format"]) != (2, "mds"):
                raise ValueError(f"a shard of format {entry['format']}, version {entry['version']}")
            for key, expected in self.columns.items():
                if entry[key] != expected:
                    raise ValueError(f"{key} is {entry[key]}, not {expected}")
            stored = entry["raw_data"] if entry["compression"] is None else entry["zip_data"]
            yield Shard(stored["basename"], entry["samples"], entry["raw_data"]["bytes"])

    def read(self, path: Path, samples: int, row: int) -> np.ndarray:
        reader = MDSReader(
            dirname=str(path.parent),
            split=None,
            **self.columns,
            compression=None,
            hashes=[],
            raw_data=FileInfo(path.name, 0, {}),
            samples=samples,
            size_limit=None,
            zip_data=None,
        )
        data = reader.get_sample_data(row)
        if len(data) != self.bytes:
            raise ValueError(f"has {len(data)} bytes, not {self.bytes}")
        return np.frombuffer(data, self.dtype)


class _Tars:
    """WebDataset's tars of .npy members of one size, so that the place of each follows from its number."""

    name = "WebDataset"

    def __init__(self, sequence_length: int, token_dtype: str) -> None:
        self.shape, self.dtype = (sequence_length,), np.dtype(token_dtype)
        example = io.BytesIO()
        np.save(example, np.zeros(self.shape, self.dtype))
        self.bytes = example.tell()
        self.array_header = example.getvalue()[: self.bytes - sequence_length * self.dtype.itemsize]
        self.stride = TAR_BLOCK + -(-self.bytes // TAR_BLOCK) * TAR_BLOCK

    def shards(self, index: Any) -> Iterator[Shard]:
        if index["wids_version"] != 1:
            raise ValueError(f"wids_version is {index['wids_version']}, not 1")
        for entry in index["shardlist"]:
            # The archive ends with two empty blocks and fills whole records.
            size = -(-(entry["nsamples"] * self.stride + 2 * TAR_BLOCK) // TAR_RECORD) * TAR_RECORD
            yield Shard(entry["url"], entry["nsamples"], size)

    def read(self, path: Path, samples: int, row: int) -> np.ndarray:
        if not 0 <= row < samples:
            raise IndexError(f"row {row} of {samples}")
        descriptor = os.open(path, os.O_RDONLY)
        try:
            data = os.pread(descriptor, TAR_BLOCK + self.bytes, row * self.stride)
        finally:
            os.close(descriptor)
        header, member = data[:TAR_BLOCK], data[TAR_BLOCK:]
        if len(member) != self.bytes:
            raise ValueError(f"has {len(member)} bytes, not {self.bytes}")
        # Name, size and magic lie at fixed places of a tar header (POSIX.1-1988).
        if not (TAR_MEMBER.fullmatch(header[:100]) and header[257:262] == b"ustar"):
            raise ValueError("is no member of a tar")
        if int(header[124:136].strip(b"\0 "), 8) != self.bytes:
            raise ValueError(f"is a member of another size than {self.bytes} bytes")
        if not member.startswith(self.array_header):
            raise ValueError(f"is no array of {self.dtype} and shape {self.shape}")
        return np.frombuffer(member, self.dtype, offset=len(self.array_header))
