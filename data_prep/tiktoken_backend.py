"""A byte-level BPE of the tokenizers library, encoded by tiktoken: the same ids in a seventh of the time.

The two differ in what a merge is. tokenizers has a list of pairs; tiktoken merges any two neighbours that spell a
token, the lowest rank first. They agree where no pair stands before what makes its parts, and each token has one pair
that ever makes it: the two parts into which the merges before it take the token's own bytes. `byte_pairs_of` finds that
out for every token. How the two libraries' regular expressions cut words is compared on texts (`proof_of`).
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import re
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.packages import require

__all__ = [
    "BYTE_PAIRS_NAME",
    "LONGEST_TEXT",
    "BytePairs",
    "Differs",
    "TiktokenBackend",
    "byte_pairs_of",
    "proof_of",
    "telling_texts",
]

BYTE_PAIRS_NAME = "byte_pairs.txt"
"""In the folder of the step `tokenizer`: there where tiktoken was proven to give the same ids."""
# The pattern of `ByteLevel` with `use_regex`, GPT-2's.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Its regular expressions give up on runs of a million characters, by a panic. Twice a piece of a long document.
LONGEST_TEXT = 2**18
BYTES = 256
PLANES = 2
"""Of Unicode, whose characters are all compared; of the others every 64th."""


class Differs(Exception):
    """tiktoken cannot stand in for this tokenizer; says why."""


@dataclass(frozen=True)
class BytePairs:
    """What tiktoken needs of a tokenizer."""

    pattern: str
    """Words, before merges."""
    ranks: dict[bytes, int]
    """Order of the merges; bytes have the first `BYTES`."""
    ids: np.ndarray
    """Token id of each rank, uint32."""
    plain: tuple[str, ...]
    """Added tokens that text makes: what has one of them is not for tiktoken."""

    def save(self, path: Path) -> None:
        """Writes them as lines: bytes in base64, rank, id."""
        lines = [f"{base64.b64encode(token).decode()} {rank} {self.ids[rank]}" for token, rank in self.ranks.items()]
        path.write_text("\n".join(lines) + "\n", encoding="ascii")

    @staticmethod
    def load(path: Path, content: dict[str, Any]) -> BytePairs:
        """Those that were saved there of the tokenizer.json with this content."""
        rows = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
        return _with_ids(
            content, {base64.b64decode(token): (int(rank), int(token_id)) for token, rank, token_id in rows}
        )


def byte_pairs_of(content: dict[str, Any]) -> BytePairs:
    """What tiktoken needs to encode as this tokenizer.json does.

    Args:
        content: the file's, with `special` set for every token that text never makes.

    Raises:
        Differs: it is no byte-level BPE without a normaliser, or its merges are not what tiktoken would do.
    """
    model, byte_of = content["model"], _byte_of_character()
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise Differs("it is no byte-level BPE")
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise Differs("its BPE has a dropout, a prefix or a suffix")
    if content.get("normalizer") is not None:
        raise Differs("it has a normaliser")
    _pattern_of(content)
    vocab: dict[str, int] = model["vocab"]
    if any(character not in vocab for character in byte_of):
        raise Differs("it lacks some of the 256 bytes")
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    ranked = {character: rank for rank, character in enumerate(byte_of)}
    order: dict[tuple[str, str], int] = {}
    for place, (left, right) in enumerate(merges):
        if left not in ranked or right not in ranked:
            raise Differs(f"its merge {left} {right} stands before what makes its parts")
        token = left + right
        # A token that has its pair already is whole wherever this one could be.
        if token not in ranked and _merged(token, order) == [left, right]:
            ranked[token] = BYTES + place
        order.setdefault((left, right), place)
    added = {token["content"] for token in content.get("added_tokens", [])}
    if model.get("ignore_merges") and any(token not in ranked and token not in added for token in vocab):
        raise Differs("it has words that no merge makes")
    rows = {bytes(map(byte_of.__getitem__, token)): (rank, vocab[token]) for token, rank in ranked.items()}
    return _with_ids(content, rows)


def _with_ids(content: dict[str, Any], rows: dict[bytes, tuple[int, int]]) -> BytePairs:
    """Of tokens with their ranks and ids."""
    ids = np.zeros(max(rank for rank, _ in rows.values()) + 1, dtype=np.uint32)
    for rank, token_id in rows.values():
        ids[rank] = token_id
    plain = tuple(token["content"] for token in content.get("added_tokens", []) if not token["special"])
    return BytePairs(_pattern_of(content), {token: rank for token, (rank, _) in rows.items()}, ids, plain)


def _pattern_of(content: dict[str, Any]) -> str:
    """The regular expression of the words; raises Differs where it is not one alone."""
    given = content.get("pre_tokenizer") or {}
    steps = given.get("pretokenizers", []) if given.get("type") == "Sequence" else [given]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        raise Differs("its words are not bytes, or begin with a space that the text does not have")
    by_itself = steps[-1].get("use_regex", True)
    if len(steps) == 1 and by_itself:
        return GPT2_PATTERN
    # Both ways leave the matches, each a word.
    if (
        len(steps) == 2
        and not by_itself
        and steps[0].get("type") == "Split"
        and "Regex" in steps[0]["pattern"]
        and (steps[0]["behavior"], steps[0]["invert"]) in (("Removed", True), ("Isolated", False))
    ):
        return steps[0]["pattern"]["Regex"]
    raise Differs("its words are not cut by one regular expression")


def _merged(token: str, order: dict[tuple[str, str], int]) -> list[str]:
    """What merges make of a token's characters: the first in their order again and again, the leftmost first."""
    parts = list(token)
    while len(parts) > 1:
        places = [order.get(pair, sys.maxsize) for pair in pairwise(parts)]
        first = min(places)
        if first == sys.maxsize:
            break
        place = places.index(first)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def _byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: printable Latin-1 for itself."""
    itself = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(BYTES) if byte not in set(itself)]
    return {chr(byte): byte for byte in itself} | {chr(BYTES + place): byte for place, byte in enumerate(others)}


class TiktokenBackend:
    """Encodes texts with tiktoken, for a tokenizer that was proven to have the same ids."""

    def __init__(self, pairs: BytePairs, threads: int = 1) -> None:
        """
        Args:
            pairs: the tokenizer.
            threads: that encode several texts at once.

        Raises:
            Differs: tiktoken does not understand its regular expression.
        """
        tiktoken = require("tiktoken", "tokenizer.backend=tiktoken works with it")
        try:
            encoding = tiktoken.Encoding("given", pat_str=pairs.pattern, mergeable_ranks=pairs.ranks, special_tokens={})
        except ValueError as error:
            raise Differs(f"tiktoken does not understand its regular expression ({error})") from error
        self._encode: Callable[[str], list[int]] = encoding.encode_ordinary
        self._ids = pairs.ids
        self._plain = re.compile("|".join(map(re.escape, pairs.plain))) if pairs.plain else None
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def encode(self, texts: list[str]) -> list[np.ndarray | None]:
        """Token ids of each text, uint32, shape (tokens,); None in the place of one that is for the other library."""
        return list((map if self._pool is None else self._pool.map)(self._encoded, texts))

    def _encoded(self, text: str) -> np.ndarray | None:
        if len(text) > LONGEST_TEXT or (self._plain is not None and self._plain.search(text)):
            return None
        try:
            ranks = self._encode(text)
        except BaseException as error:
            # A panic of Rust has no other base, and no class that could be imported.
            if type(error).__name__ != "PanicException":
                raise
            return None
        return self._ids[np.array(ranks, dtype=np.uint32)]


def telling_texts(special: Iterable[str]) -> list[str]:
    """Texts that tell regular expressions apart: every character beside letters, digits and itself; runs; `special`."""
    surrogates = range(0xD800, 0xE000)
    every = [*range(PLANES << 16), *range(PLANES << 16, sys.maxunicode, 64)]
    places = [f"a{c}b {c}{c}1{c}2\n{c} '{c}.\n\n" for c in map(chr, every) if ord(c) not in surrogates]
    runs = [run * (LONGEST_TEXT // len(run)) for run in (" ", "\n", "a", "1", "!", " \n", "\t ", "\u4e00", "a\u0301")]
    return ["".join(places[start : start + 256]) for start in range(0, len(places), 256)] + runs + list(special)


def proof_of(
    backend: TiktokenBackend, encode: Callable[[list[str]], list[np.ndarray]], texts: Iterable[str]
) -> dict[str, Any]:
    """Compares the ids of texts.

    Args:
        encode: ids of texts by the tokenizers library.

    Returns:
        `texts` and `characters` compared, `left_to_tokenizers` of them, a SHA-256 of all texts and of all ids.

    Raises:
        Differs: of a text they are not the same.
    """
    compared = characters = left = 0
    of_texts, of_ids = hashlib.sha256(), hashlib.sha256()
    for text in texts:
        (right,), (fast,) = encode([text]), backend.encode([text])
        if fast is None:
            left += 1
        elif not np.array_equal(right, fast):
            raise Differs(f"of text {compared} of the sample tiktoken makes other tokens")
        compared, characters = compared + 1, characters + len(text)
        of_texts.update(f"{len(text)} {text}".encode())
        of_ids.update(np.ascontiguousarray(right, dtype="<u4").tobytes())
    return {
        "version": importlib.metadata.version("tiktoken"),
        "texts": compared,
        "characters": characters,
        "left_to_tokenizers": left,
        "sha256_of_texts": of_texts.hexdigest(),
        "sha256_of_ids": of_ids.hexdigest(),
    }
