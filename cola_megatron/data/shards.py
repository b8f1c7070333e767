"""Prepared token shards on local disk: random access to their sequences.

A prepared folder::

    tokenizer.json     the tokenizer of every token id below
    manifest.json      what the folder holds and from what it was made (`cola_megatron.data.manifest`)
    train/             index.json and shard.*.mds: fixed-length token sequences
    held_out/          the same, from documents that no training sequence contains
"""

from __future__ import annotations

import hashlib
import json
import operator
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from cola_megatron.data.manifest import TOKENIZER_NAME, ShardError, Verify, file_problems, read_manifest
from cola_megatron.data.streaming_backend import MDSReader

__all__ = ["TOKENS_COLUMN", "TokenShards", "tokens_encoding"]

INDEX_NAME = "index.json"
TOKENS_COLUMN = "tokens"


def tokens_encoding(token_dtype: str, sequence_length: int) -> str:
    """MDS encoding of the tokens column: values only, as type and shape are fixed."""
    return f"ndarray:{token_dtype}:{sequence_length}"


def _cure(folder: Path) -> str:
    return f"run `cola prep verify {folder}`, then prepare the folder again or copy the file anew"


class TokenShards(Dataset[np.ndarray]):
    """Random access to the token sequences of one split of a prepared folder.

    Reads with mosaicml-streaming's MDS reader, which opens the shard file for each sequence: nothing is held open,
    shared or cached, so the object can be used from DataLoader workers, forked or spawned, and pickling it (to a
    spawned worker) does not repeat the checks.
    """

    def __init__(self, folder: Path, split: str, verify: Verify = "hash") -> None:
        """
        Args:
            folder: a prepared folder.
            split: "train" or "held_out".
            verify: "hash" compares sizes and SHA-256 of all files of the split with the manifest, "size" only sizes,
                "none" nothing. Where several processes open one folder, hash in one of them.

        Raises:
            ShardError: the manifest, the index or a shard is missing or differs, or the split holds no sequence.
        """
        self.folder = Path(folder).absolute()
        self.split = split
        self.manifest = read_manifest(self.folder)
        if split not in self.manifest.splits:
            raise ShardError(f"{self.folder} has no split {split!r}; it has {', '.join(self.manifest.splits)}")
        used = {
            name: record
            for name, record in self.manifest.files.items()
            if name == TOKENIZER_NAME or name.startswith(f"{split}/")
        }
        for problem in file_problems(self.folder, used, verify):
            raise ShardError(f"{problem}; {_cure(self.folder)}")
        self._readers = self._open_readers()
        self._ends = np.cumsum([reader.samples for reader in self._readers], dtype=np.int64)
        if not self._readers:
            raise ShardError(
                f"{self.folder / split} holds no sequence: its documents do not fill {self.sequence_length} tokens. "
                "Documents are split by hash: prepare with more documents, or a larger --held-out-fraction"
            )

    def _open_readers(self) -> list[MDSReader]:
        """One reader per shard, in the order of the index."""
        path = self.folder / self.split / INDEX_NAME
        try:
            index = json.loads(path.read_bytes())
            readers = [MDSReader.from_json(str(self.folder), self.split, shard) for shard in index["shards"]]
            samples = sum(reader.samples for reader in readers)
            encodings = {(*reader.column_names, *reader.column_encodings) for reader in readers}
        except FileNotFoundError as error:
            raise ShardError(f"{path} is missing; {_cure(self.folder)}") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ShardError(f"{path} cannot be read as an MDS index ({error!r}); {_cure(self.folder)}") from error
        if samples != self.manifest.splits[self.split].sequences:
            raise ShardError(
                f"{path} lists {samples:,} sequences, the manifest {self.manifest.splits[self.split].sequences:,}; "
                f"{_cure(self.folder)}"
            )
        expected = (TOKENS_COLUMN, tokens_encoding(self.manifest.token_dtype, self.sequence_length))
        if encodings - {expected}:
            raise ShardError(f"{path} lists columns other than {' '.join(expected)}; {_cure(self.folder)}")
        return readers

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
            ShardError: the shard cannot be read, or what was read is not a sequence of valid token ids.
        """
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        reader = self._readers[shard]
        row = index - int(self._ends[shard]) + reader.samples
        try:
            data = reader.get_sample_data(row)
        except (OSError, ValueError, IndexError, OverflowError, MemoryError) as error:
            raise self._read_error(reader, row, f"cannot be read ({error!r})") from error
        # The decoder would cut longer data to size without a word.
        if len(data) != reader.column_sizes[0]:
            raise self._read_error(reader, row, f"has {len(data)} bytes, not {reader.column_sizes[0]}")
        tokens = reader.decode_sample(data)[TOKENS_COLUMN].astype(np.int64)
        largest = int(tokens.max())
        if largest >= self.vocab_size:
            raise self._read_error(reader, row, f"holds token id {largest}, the vocabulary has {self.vocab_size}")
        return tokens

    def _read_error(self, reader: MDSReader, row: int, what: str) -> ShardError:
        path = self.folder / self.split / reader.raw_data.basename
        return ShardError(f"{path}: sample {row} {what}; {_cure(self.folder)}")

    @property
    def fingerprint(self) -> str:
        """Identifies the sequences of this split: two folders with equal fingerprints train alike."""
        hashes = [record.sha256 for name, record in sorted(self.manifest.files.items()) if name.startswith(self.split)]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

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
        """Token id of padding (no prepared sequence contains it)."""
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
    def tokenizer_path(self) -> Path:
        """The tokenizer.json that made the token ids."""
        return self.folder / TOKENIZER_NAME
