"""Writing the sequences of one split of one task as shards: mosaicml-streaming's MDS, or tars for WebDataset."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import webdataset

from cola_megatron.data.formats import INDEX_NAME, TAR_BLOCK, TAR_RECORD, TOKENS_COLUMN, tokens_encoding
from cola_megatron.data.streaming_backend import MDSWriter, compress
from data_prep.pack import Packer
from data_prep.recipe import ShardSettings

__all__ = ["INDEX_NAME", "SplitWriter", "merge_indexes"]

MEMBER_DIGITS = 9


class _Shards(Protocol):
    """Open shards of one folder."""

    def write(self, sequence: np.ndarray) -> None:
        """Adds one sequence."""

    def finish(self) -> None:
        """Writes the last shard and the index."""

    def abandon(self) -> None:
        """Lets go of everything; what was written is thrown away with its folder."""


class SplitWriter:
    """Packs the documents of one split and writes the sequences. A context manager.

    One shard is held in memory at a time. Leaving the block normally finishes the last shard and the index.
    """

    def __init__(self, folder: Path, settings: ShardSettings, packer: Packer, token_dtype: str, length: int) -> None:
        kind = _MDSShards if settings.format == "mds" else _TarShards
        self._shards: _Shards = kind(folder, settings, token_dtype, length)
        self._packer, self._length = packer, length
        self._documents = self._characters = self._sequences = 0

    def add(self, tokens: np.ndarray, characters: int) -> None:
        """Adds one document: its tokens with the end-of-text id, shape (count,), and its length in characters."""
        self._documents += 1
        self._characters += characters
        self._write(self._packer.add(tokens))

    @property
    def record(self) -> dict[str, int]:
        """What the split holds, by the fields of `StreamRecord`."""
        return {
            "documents": self._documents,
            "characters": self._characters,
            "sequences": self._sequences,
            "tokens": self._sequences * self._length,
            "padding_tokens": self._packer.padding_tokens,
            "dropped_tokens": self._packer.dropped_tokens,
        }

    def _write(self, sequences: Iterator[np.ndarray]) -> None:
        for sequence in sequences:
            self._shards.write(sequence)
            self._sequences += 1

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._shards.abandon()
            return
        self._write(self._packer.finish())
        self._shards.finish()


class _MDSShards:
    def __init__(self, folder: Path, settings: ShardSettings, token_dtype: str, length: int) -> None:
        self._writer = MDSWriter(
            columns={TOKENS_COLUMN: tokens_encoding(token_dtype, length)},
            out=str(folder),
            size_limit=settings.size_bytes,
            compression=settings.compression,
            hashes=["xxh64"],
            max_workers=1,  # its threads only upload to remote stores
        )

    def write(self, sequence: np.ndarray) -> None:
        self._writer.write({TOKENS_COLUMN: sequence})

    def finish(self) -> None:
        writer = self._writer
        if writer.new_samples:
            writer.flush_shard()
            writer._reset_cache()
        # The writer queues an upload per shard even for a local folder, and looks only once a second whether the
        # queue is empty. With its one thread, a task that has run means that it is.
        writer.executor.submit(int).result()
        writer.finish()

    def abandon(self) -> None:
        # Not the writer's own __exit__, which would write another shard when the disk is already full, nor its
        # cancellation, which logs a traceback for every upload that was still queued.
        self._writer.executor.shutdown(wait=True)


class _TarShards:
    """Members `000000000.npy`, ..., all of one size, numbered through the shard: a reader can compute where each is."""

    def __init__(self, folder: Path, settings: ShardSettings, token_dtype: str, length: int) -> None:
        self._folder, self._settings = folder, settings
        folder.mkdir(parents=True)
        member = TAR_BLOCK + -(-len(_npy(np.zeros(length, token_dtype))) // TAR_BLOCK) * TAR_BLOCK
        self._samples_per_shard = max(1, (settings.size_bytes - TAR_RECORD) // member)
        self._index: list[dict[str, Any]] = []
        self._new_shard()

    def _new_shard(self) -> None:
        self._buffer, self._samples = io.BytesIO(), 0
        # Times and names of people would make two equal shards differ.
        self._tar = webdataset.TarWriter(self._buffer, user="", group="", mode=0o644, mtime=0, encoder=False)

    def write(self, sequence: np.ndarray) -> None:
        self._tar.write({"__key__": f"{self._samples:0{MEMBER_DIGITS}d}", "npy": _npy(sequence)})
        self._samples += 1
        if self._samples == self._samples_per_shard:
            self._close_shard()

    def _close_shard(self) -> None:
        self._tar.close()
        name, data = f"shard-{len(self._index):06d}.tar", self._buffer.getvalue()
        if self._settings.compression is not None:
            name, data = f"{name}.{self._settings.compression}", compress(self._settings.compression, data)
        (self._folder / name).write_bytes(data)
        self._index.append({"url": name, "nsamples": self._samples})
        self._new_shard()

    def finish(self) -> None:
        if self._samples:
            self._close_shard()
        self.abandon()
        (self._folder / INDEX_NAME).write_text(json.dumps(_wids(self._index)))

    def abandon(self) -> None:
        with contextlib.closing(self._tar):
            self._buffer = io.BytesIO()


def merge_indexes(folder: Path, parts: list[str], shard_format: str) -> None:
    """Writes the index of a split over the indexes of its parts, and removes those.

    Args:
        folder: the split.
        parts: paths of folders with an index, relative to `folder`, in the order that the shards get.
        shard_format: "mds" or "webdataset".
    """
    shards: list[dict[str, Any]] = []
    for part in parts:
        path = folder / part / INDEX_NAME
        index = json.loads(path.read_bytes())
        for shard in index["shards" if shard_format == "mds" else "shardlist"]:
            if shard_format == "mds":
                for data in filter(None, (shard["raw_data"], shard["zip_data"])):
                    data["basename"] = f"{part}/{data['basename']}"
            else:
                shard["url"] = f"{part}/{shard['url']}"
            shards.append(shard)
        path.unlink()
    whole = {"version": 2, "shards": shards} if shard_format == "mds" else _wids(shards)
    (folder / INDEX_NAME).write_text(json.dumps(whole, sort_keys=True))


def _wids(shards: list[dict[str, Any]]) -> dict[str, Any]:
    return {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards}


def _npy(sequence: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, sequence)
    return buffer.getvalue()
