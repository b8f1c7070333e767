"""A prepared folder on local disk or behind an fsspec URL: its manifest, its small files, and its shards.

A prepared folder::

    manifest.json      what the folder holds and from what it was made (`cola_megatron.data.manifest`)
    tokenizer.json     the tokenizer of every token id below
    report.json        what preparation counted
    train/             index.json, and below <source>/<task>/ shards of token sequences of one length
    held_out/          the same, from documents that no training sequence contains

Shards are MDS files (shard.00000.mds) or tars (shard-000000.tar), each perhaps compressed (.zstd); index.json is the
one that mosaicml-streaming or webdataset reads.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import IO

import fsspec

from cola_megatron.data.cache import DEFAULT_CACHE_BYTES, ShardCache, default_cache_folder
from cola_megatron.data.formats import Shard
from cola_megatron.data.manifest import (
    MANIFEST_NAME,
    BadShardError,
    Manifest,
    ShardError,
    parse_manifest,
    read_manifest,
    sha256_of,
)
from cola_megatron.data.streaming_backend import decompress
from cola_megatron.data.transfer import copy_verified, is_url, retrying

__all__ = ["PreparedFolder"]

FETCHED = "folders"
"""Below the cache: the small files of remote folders, which count towards no limit."""
SHARDS_AT_LEAST = 4
"""So that a process that reads one shard does not push out the one that another is about to read."""


class PreparedFolder:
    """Where the files of a prepared folder are. Holds nothing open; can be pickled and used after a fork."""

    def __init__(
        self, place: str | Path, cache_folder: Path | None = None, cache_bytes: int = DEFAULT_CACHE_BYTES
    ) -> None:
        """
        Args:
            place: a folder, or an fsspec URL (s3://bucket/corpus, https://host/corpus, ...). A file:// URL is remote.
            cache_folder: for copies of remote shards and for decompressed ones, on a disk of this node; None: see
                `default_cache_folder`.
            cache_bytes: limit of the shards in it, whatever folders they come from.

        Raises:
            ShardError: there is no valid manifest, or it cannot be reached.
        """
        self.is_remote = is_url(place)
        self.place = str(place).rstrip("/") if self.is_remote else str(Path(place).expanduser().absolute())
        self.cache_folder = cache_folder or default_cache_folder()
        self.cache_bytes = cache_bytes
        self._small_files = Path(self.place)
        if not self.is_remote:
            self.manifest = read_manifest(self._small_files)
        else:
            self.manifest = self._fetch_manifest()
        self.uses_cache = self.is_remote or self.manifest.compression is not None
        self._cache = ShardCache(self.cache_folder, cache_bytes) if self.uses_cache else None

    def __str__(self) -> str:
        return self.place

    def where(self, name: str) -> str:
        """Path or URL of a file, for reading it and for people."""
        return f"{self.place}/{name}"

    @property
    def cure(self) -> str:
        """What to do about a damaged file."""
        if self.is_remote:
            return "check the folder that it was uploaded from with `cola prep verify`, then upload the file anew"
        return f"run `cola prep verify {self.place}`, then prepare the folder again or copy the file anew"

    def small_file(self, name: str) -> Path:
        """A file other than a shard on local disk; where it is remote, brought there and compared with the manifest.

        Raises:
            ShardError: the manifest does not know it, or it cannot be read.
        """
        path = self._small_files / name
        if not self.is_remote:
            return path
        record = self.manifest.files.get(name)
        if record is None:
            raise ShardError(f"{self.where(name)} is not in the manifest; {self.cure}")
        if not path.is_file() or sha256_of(path) != record.sha256:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                with unfinished.open("w+b") as file:
                    copy_verified(self.where(name), record, file)
                    file.truncate()
                unfinished.replace(path)
            finally:
                unfinished.unlink(missing_ok=True)
        return path

    def shard_path(self, split: str, shard: Shard) -> Path:
        """A shard on local disk, uncompressed. In the cache it may vanish at any time: see `ShardCache.path`.

        Raises:
            BadShardError: it is missing or damaged; found out here only for shards that go through the cache.
            ShardError: it cannot be fetched.
        """
        name = f"{split}/{shard.file}"
        if self._cache is None:
            return Path(self.place) / name
        record = self.manifest.files[name]

        def make(file: IO[bytes]) -> None:
            copy_verified(self.where(name), record, file)
            if self.manifest.compression is not None:
                file.seek(0)
                try:
                    raw = decompress(self.manifest.compression, file.read(record.bytes))
                except Exception as error:  # each library of compression has an error class of its own
                    raise BadShardError(f"{self.where(name)} cannot be decompressed: {error}") from error
                file.seek(0)
                file.write(raw)

        return self._cache.path(record.sha256, max(record.bytes, shard.raw_bytes), make)

    def check_cache(self, shards: list[Shard]) -> None:
        """Refuse a cache that is too small for these shards; raises ShardError."""
        needed = SHARDS_AT_LEAST * max(shard.raw_bytes for shard in shards)
        if self.uses_cache and self.cache_bytes < needed:
            raise ShardError(
                f"data.cache_bytes={self.cache_bytes} holds fewer than {SHARDS_AT_LEAST} shards of {self.place}; give "
                f"at least {needed}"
            )

    def _fetch_manifest(self) -> Manifest:
        """The manifest of a remote folder; its small files get a place named after its content."""
        url = self.where(MANIFEST_NAME)
        try:
            content = retrying(url, lambda: _content(url))
        except BadShardError as error:
            raise ShardError(f"{error}: not a finished prepared folder; upload all that `cola prep` wrote") from error
        self._small_files = self.cache_folder / FETCHED / hashlib.sha256(content).hexdigest()
        return parse_manifest(content, url)


def _content(url: str) -> bytes:
    with fsspec.open(url, "rb") as file:
        return file.read()
