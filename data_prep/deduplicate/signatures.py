"""What duplicates have in common: a hash of the text, MinHash keys, and n-grams."""

from __future__ import annotations

import hashlib
import unicodedata
from pathlib import Path

import numpy as np

from data_prep.clean.settings import DeduplicationSettings, NearDuplicateSettings
from data_prep.deduplicate.sketches import SketchWriter, load_array, sketch_of
from data_prep.packages import require

__all__ = ["NO_KEY", "BandKeys", "Signatures", "exact_key"]

EXACT_NAME = "exact.npy"
BANDS_NAME = "bands.npy"

# The key of a document that has none: too short for one, or of a source whose duplicates stay.
NO_KEY = 0
NO_EXACT_KEY = bytes(16)
# Bounds the memory of a signature: 112 hashes of each n-gram are held at once, 8 bytes each and in three copies.
NGRAMS_AT_ONCE = 1024


class Signatures:
    """The signatures of a sequence of documents.

    Exact duplicates share the hash, near duplicates at least one band key with high probability; their sketches say how
    alike two documents are. Memory: 16 bytes per document for the hash, 8 per band, and its sketch.
    """

    def __init__(self, settings: DeduplicationSettings) -> None:
        """
        Args:
            settings: what to sign; a part that is off costs nothing.

        Raises:
            DataPrepError: a package is missing; says the cure.
        """
        self._exact_width = 2 if settings.exact else 0
        self._minhash = None if settings.near is None else BandKeys(settings.near)
        self._band_count = 0 if self._minhash is None else self._minhash.bands
        self._exact, self._bands, self._sketches = bytearray(), bytearray(), SketchWriter()
        self._count = 0

    def add(self, text: str, exact: bool = True, near: bool = True) -> None:
        """Sign the next document; one that is not signed for a kind of duplicates has none of that kind."""
        if self._exact_width:
            self._exact += exact_key(text) if exact else NO_EXACT_KEY
        if self._minhash is not None:
            ngrams = self._minhash.ngrams(text if near else "")
            self._bands += self._minhash.keys(ngrams).tobytes()
            self._sketches.add(sketch_of(ngrams))
        self._count += 1

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """The signatures so far.

        Returns:
            exact: uint64, shape (documents, 2): 128-bit hashes; (documents, 0) where they are off.
            bands: uint64, shape (bands, documents): MinHash keys, `NO_KEY` for a document with fewer words than an
                n-gram; (0, documents) where they are off.
        """
        exact = np.frombuffer(bytes(self._exact), dtype="<u8").reshape(self._count, self._exact_width)
        bands = np.frombuffer(bytes(self._bands), dtype="<u8").reshape(self._count, self._band_count)
        return exact, bands.T

    def save(self, folder: Path) -> None:
        """Write them as files into an existing folder."""
        exact, bands = self.arrays()
        np.save(folder / EXACT_NAME, exact)
        # In C order, one band is one contiguous row of the file.
        np.save(folder / BANDS_NAME, np.ascontiguousarray(bands))
        self._sketches.save(folder)

    @staticmethod
    def load_exact(folder: Path) -> np.ndarray:
        """The hashes that were saved there, shape (documents, 2); the file is memory-mapped."""
        return load_array(folder / EXACT_NAME)

    @staticmethod
    def load_band(folder: Path, band: int) -> np.ndarray:
        """One band of the keys that were saved there, shape (documents,); the file is memory-mapped."""
        return load_array(folder / BANDS_NAME)[band]

    @staticmethod
    def count(folder: Path) -> int:
        """How many documents were signed there."""
        return load_array(folder / EXACT_NAME).shape[0]


def exact_key(text: str) -> bytes:
    """128 bits of BLAKE2b over the text in NFC, with single spaces for whitespace."""
    normalised = " ".join(unicodedata.normalize("NFC", text).split())
    return hashlib.blake2b(normalised.encode(), digest_size=16).digest()


class BandKeys:
    """datatrove's MinHash, with the hashes of a band folded into one key."""

    def __init__(self, settings: NearDuplicateSettings) -> None:
        for package in ("spacy", "xxhash", "datatrove.pipeline.dedup.minhash"):
            require(package, "deduplication.near works with it")
        from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
        from datatrove.utils.text import TextNormConfig
        from xxhash import xxh3_64_intdigest

        from data_prep.clean.words import word_tokenizer

        self.bands = settings.bands
        config = MinhashConfig(
            n_grams=settings.ngram,
            num_buckets=settings.bands,
            hashes_per_bucket=settings.rows,
            seed=settings.seed,
            norm_config=TextNormConfig(norm_numbers=settings.numbers_alike),
        )
        # The folder is that of a pipeline which never runs here.
        self._minhash = MinhashDedupSignature(".", config, language=word_tokenizer(settings.word_language))
        self._hash = xxh3_64_intdigest

    def __call__(self, text: str) -> np.ndarray:
        """Key of each band of a text; see `keys`."""
        return self.keys(self.ngrams(text))

    def ngrams(self, text: str) -> np.ndarray:
        """Hashes of the word n-grams in their order: uint64, shape (count, 1)."""
        return self._minhash.get_shingles(text)

    def keys(self, ngrams: np.ndarray) -> np.ndarray:
        """Key of each band: uint64, shape (bands,)."""
        keys = np.full(self.bands, NO_KEY, dtype=np.uint64)
        if not len(ngrams):
            return keys
        smallest = self._signature(ngrams[:NGRAMS_AT_ONCE])
        for start in range(NGRAMS_AT_ONCE, len(ngrams), NGRAMS_AT_ONCE):
            np.minimum(smallest, self._signature(ngrams[start : start + NGRAMS_AT_ONCE]), out=smallest)
        for band, row in enumerate(smallest):
            # 1 in place of the key that means none.
            keys[band] = self._hash(row.astype("<u8").tobytes(), seed=band) or 1
        return keys

    def _signature(self, ngrams: np.ndarray) -> np.ndarray:
        """Smallest hashes of some n-grams: uint64, shape (bands, rows)."""
        return np.array(self._minhash.get_signature(ngrams), dtype=np.uint64)
