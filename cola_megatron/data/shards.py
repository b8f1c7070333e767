"""Random access to the token sequences of a prepared folder (see `cola_megatron.data.folder`), whatever its format."""

from __future__ import annotations

import hashlib
import itertools
import json
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from cola_megatron.data.cache import DEFAULT_CACHE_BYTES
from cola_megatron.data.folder import PreparedFolder
from cola_megatron.data.formats import INDEX_NAME, TOKENS_COLUMN, Shard, shard_reader, tokens_encoding
from cola_megatron.data.manifest import (
    TOKENIZER_NAME,
    BadShardError,
    Manifest,
    MixtureRecord,
    ShardError,
    Verify,
    file_problems,
)

__all__ = ["TOKENS_COLUMN", "TokenShards", "TokenStream", "tokens_encoding"]

READS = 5
"""Times that a copy in the cache may vanish between its fetching and its reading."""

# What readers raise over files that are gone or damaged.
READ_ERRORS = (OSError, ValueError, IndexError, OverflowError, MemoryError)


@dataclass(frozen=True)
class TokenStream:
    """The sequences of one source: numbers first ... first + len of the split."""

    name: str
    first: int
    shard_sizes: tuple[int, ...]
    """Sequences in each shard."""
    largest_shard_bytes: int
    """Before compression."""
    mixture: MixtureRecord

    def __len__(self) -> int:
        return sum(self.shard_sizes)


class TokenShards(Dataset[np.ndarray]):
    """Random access to the token sequences of one split of a prepared folder, source after source.

    A sequence may end in padding, and holds none before its end. No file is held open, so the object can be used from
    DataLoader workers, forked or spawned, and pickling it (to a spawned worker) does not repeat the checks.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        verify: Verify = "hash",
        skip_bad: bool = False,
        cache_folder: Path | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        """
        Args:
            folder: a prepared folder, or the fsspec URL of one.
            split: "train" or "held_out".
            verify: "hash" compares sizes and SHA-256 of all files of the split with the manifest, "size" only sizes,
                "none" nothing. Where several processes open one folder, hash in one of them. What comes from a URL is
                always compared when it is fetched, and only then.
            skip_bad: note shards that are missing or differ in `bad` instead of refusing the folder.
            cache_folder: see `PreparedFolder`.
            cache_bytes: see `PreparedFolder`.

        Raises:
            ShardError: the manifest, the index or a shard is missing or differs, the split holds no sequence, or the
                cache is too small.
        """
        self.folder, self.split = PreparedFolder(folder, cache_folder, cache_bytes), split
        if split not in self.manifest.splits:
            raise ShardError(f"{self.folder} has no split {split!r}; it has {', '.join(self.manifest.splits)}")
        self.bad: dict[str, str] = {}
        """What is wrong with shards that are known to be missing or damaged, by file."""
        self._reader = shard_reader(self.manifest)
        if not self.folder.is_remote:
            self._check(verify, [TOKENIZER_NAME, f"{split}/{INDEX_NAME}"])
        self._shards = self._read_index()
        self._ends = np.cumsum([shard.samples for shard in self._shards], dtype=np.int64)
        if not self._shards:
            raise ShardError(
                f"{self.folder.where(split)} holds no sequence: its documents do not fill {self.sequence_length} "
                "tokens. Documents are split by hash: prepare with more documents, or a larger held_out_fraction"
            )
        self.folder.check_cache(self._shards)
        self.streams = self._read_streams()
        if not self.folder.is_remote:
            self._check(verify, [f"{split}/{shard.file}" for shard in self._shards], skip_bad)

    def _check(self, verify: Verify, names: Iterable[str], skip_bad: bool = False) -> None:
        """Compare files with the manifest; raises ShardError, or notes them in `bad`."""
        for name in names:
            if name not in self.manifest.files:
                raise ShardError(f"{self.folder.where(name)} is not in the manifest; {self.folder.cure}")
            for problem in file_problems(Path(self.folder.place), {name: self.manifest.files[name]}, verify):
                if not skip_bad:
                    raise ShardError(f"{problem}; {self.folder.cure}")
                self.exclude({name.removeprefix(f"{self.split}/"): problem})

    def exclude(self, bad: Mapping[str, str]) -> None:
        """Add to `bad`; raises ShardError when a stream has no shard left."""
        self.bad.update(bad)
        for stream in self.streams:
            if all(shard.file in self.bad for shard in self._shards if _source(shard) == stream.name):
                first = next(problem for file, problem in self.bad.items() if file.startswith(f"{stream.name}/"))
                raise ShardError(
                    f"all {len(stream.shard_sizes)} shards of {self.split}/{stream.name} are missing or damaged: "
                    f"{first}; {self.folder.cure}"
                )

    def _read_index(self) -> list[Shard]:
        """The shards, those of one source together and otherwise in the order of the index."""
        where = self.folder.where(f"{self.split}/{INDEX_NAME}")
        try:
            index = json.loads(self.folder.small_file(f"{self.split}/{INDEX_NAME}").read_bytes())
            shards = [shard for shard in self._reader.shards(index) if shard.samples]
            samples = sum(shard.samples for shard in shards)
        except FileNotFoundError as error:
            raise ShardError(f"{where} is missing; {self.folder.cure}") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"cannot be read as an index of {self._reader.name} shards ({error!r})"
            raise ShardError(f"{where} {what}; {self.folder.cure}") from error
        expected = self.manifest.total(self.split).sequences
        if samples != expected:
            raise ShardError(f"{where} lists {samples:,} sequences, the manifest {expected:,}; {self.folder.cure}")
        for shard in shards:
            if f"{self.split}/{shard.file}" not in self.manifest.files:
                raise ShardError(f"{where} lists {shard.file}, which is not in the manifest; {self.folder.cure}")
        sources = list(dict.fromkeys(map(_source, shards)))
        return sorted(shards, key=lambda shard: sources.index(_source(shard)))

    def _read_streams(self) -> tuple[TokenStream, ...]:
        streams, first = [], 0
        for name, group in itertools.groupby(self._shards, _source):
            if name not in self.manifest.mixture:
                raise ShardError(f"{self.folder}: the mixture in the manifest has no source {name}; {self.folder.cure}")
            shards = list(group)
            sizes = tuple(shard.samples for shard in shards)
            largest = max(shard.raw_bytes for shard in shards)
            streams.append(TokenStream(name, first, sizes, largest, self.manifest.mixture[name]))
            first += sum(sizes)
        return tuple(streams)

    def __len__(self) -> int:
        """Number of sequences."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        """One sequence.

        Args:
            index: 0 <= index < len(self).

        Returns:
            int64 array of shape (sequence_length,), token ids in [0, vocab_size).

        Raises:
            IndexError: the index is out of range (negative ones are).
            BadShardError: the shard is missing or damaged, or what was read is not a sequence of valid token ids.
            ShardError: the shard cannot be fetched.
        """
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._shards[number]
        row = index - int(self._ends[number]) + shard.samples
        tokens = self._read(shard, row).astype(np.int64)
        largest = int(tokens.max())
        if largest >= self.vocab_size:
            raise self._row_error(shard, row, f"holds token id {largest}, the vocabulary has {self.vocab_size}")
        return tokens

    def shard_of(self, index: int) -> str:
        """The shard of a sequence, by its file in the folder of the split."""
        return self._shards[int(np.searchsorted(self._ends, index, side="right"))].file

    def _read(self, shard: Shard, row: int) -> np.ndarray:
        if shard.file in self.bad:
            raise BadShardError(self.bad[shard.file])
        for _ in range(READS):
            try:
                path = self.folder.shard_path(self.split, shard)
            except BadShardError as error:
                self.bad[shard.file] = f"{error}; {self.folder.cure}"  # fetching it again would not help
                raise BadShardError(self.bad[shard.file]) from error
            try:
                return self._reader.read(path, shard.samples, row)
            except READ_ERRORS as error:
                if not (self.folder.uses_cache and isinstance(error, FileNotFoundError)):
                    what = str(error) if type(error) is ValueError else f"cannot be read ({error!r})"
                    raise self._row_error(shard, row, what) from error
        raise ShardError(
            f"{self.folder.where(f'{self.split}/{shard.file}')}: its copy in {self.folder.cache_folder} was pushed out "
            f"{READS} times before it could be read; raise data.cache_bytes"
        )

    def _row_error(self, shard: Shard, row: int, what: str) -> BadShardError:
        cure = self.folder.cure
        if self.folder.uses_cache:
            cure = f"delete the copies in {self.folder.cache_folder}; where that does not help, {cure}"
        return BadShardError(f"{self.folder.where(f'{self.split}/{shard.file}')}: sample {row} {what}; {cure}")

    @property
    def manifest(self) -> Manifest:
        """What the folder holds."""
        return self.folder.manifest

    @property
    def fingerprint(self) -> str:
        """Identifies the sequences of this split and their mixture: equal fingerprints train alike."""
        files = sorted(self.manifest.files.items())
        content = [record.sha256 for name, record in files if name.startswith(f"{self.split}/")]
        content += [f"{stream.name} {stream.mixture.model_dump_json()}" for stream in self.streams]
        return hashlib.sha256("".join(content).encode()).hexdigest()

    @property
    def sequence_length(self) -> int:
        """Tokens per sequence."""
        return self.manifest.sequence_length

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id of the tokenizer."""
        return self.manifest.vocab_size

    @property
    def padding_id(self) -> int:
        """Token id of padding."""
        return self.manifest.padding_id

    @property
    def end_of_text_id(self) -> int:
        """Token id that ends every document."""
        return self.manifest.end_of_text_id

    @property
    def tokens(self) -> int:
        """Tokens in all sequences of the split."""
        return len(self) * self.sequence_length

    @property
    def raw_bytes(self) -> int:
        """Size of all shards of the split, decompressed."""
        return sum(shard.raw_bytes for shard in self._shards)

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer.json that made the token ids, on local disk."""
        return self.folder.small_file(TOKENIZER_NAME)


def _source(shard: Shard) -> str:
    """A shard lies below a folder that is named after its source."""
    return shard.file.split("/", 1)[0]
