"""Training, opening and applying the tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep.errors import DataPrepError
from data_prep.pieces import LONGEST_PIECE, PIECE, TooLong, pieces_of
from data_prep.recipe import TokenizerSettings
from data_prep.tiktoken_backend import TiktokenBackend

__all__ = ["DocumentTokenizer", "train_tokenizer"]

END_OF_MESSAGE = "<|im_end|>"
# Of padding, where nothing is padded: no token has it.
NO_TOKEN = -1


def train_tokenizer(documents: Iterable[str], vocab_size: int, end_of_text: str, padding: str) -> Tokenizer:
    """Train a byte-level BPE of exactly `vocab_size` tokens.

    Ids 0, 1, 2 are `end_of_text`, `<|im_end|>` and `padding`, then come the 256 bytes, then the merges. Any text can
    be encoded and decodes to itself.

    Raises:
        DataPrepError: `vocab_size` is too small for the bytes, or too large for the documents.
    """
    special_tokens = [end_of_text, END_OF_MESSAGE, padding]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(special_tokens) + len(alphabet)
    if vocab_size < smallest:
        raise DataPrepError(f"vocab_size {vocab_size}: a byte-level tokenizer has at least {smallest} tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    reached = tokenizer.get_vocab_size()
    if reached != vocab_size:
        raise DataPrepError(
            f"vocab_size {vocab_size}: the train documents yield at most {reached}; lower it to that, or give more text"
        )
    return tokenizer


class DocumentTokenizer:
    """A tokenizer.json, with the ids that packing needs."""

    def __init__(self, path: Path, settings: TokenizerSettings, pads: bool = True) -> None:
        """
        Args:
            path: a tokenizer.json of the Hugging Face tokenizers library.
            settings: the tokens that end documents and fill sequences.
            pads: whether packing fills sequences; else the tokenizer may lack the token of that.

        Raises:
            DataPrepError: the file is missing or not a tokenizer, does not know one of the tokens, or encodes the same
                text otherwise each time.
        """
        try:
            # Through Python, as the library reports every fault as a bare Exception.
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataPrepError(f"{path}: the tokenizer cannot be read ({error}); check --tokenizer") from error
        try:
            self.content: dict[str, Any] = json.loads(text)
            """The file's, with `special` set for every token that text never makes."""
            _make_special(self.content, (settings.end_of_text, settings.padding, END_OF_MESSAGE))
            self._tokenizer = Tokenizer.from_str(json.dumps(self.content))
        except Exception as error:
            raise DataPrepError(f"{path}: not a tokenizer.json ({error}); check --tokenizer") from error
        if dropout := self.content["model"].get("dropout"):
            raise DataPrepError(
                f"{path}: has a dropout of {dropout}, so that a text has other tokens each time; "
                "set model.dropout to null in it"
            )
        self._path = path
        self.end_of_text_id = self._id_of(settings.end_of_text, "end_of_text")
        self.padding_id = self._padding_id(settings, pads)
        self._boundaries = [settings.end_of_text, settings.padding]
        self.unknown_id = self._unknown_id()
        # Not the number of tokens: ids may have gaps.
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.token_dtype = "uint16" if self.vocab_size <= 2**16 else "uint32"
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._fast: TiktokenBackend | None = None

    def encode_with(self, backend: TiktokenBackend | None) -> None:
        """Encodes with a backend that was proven to give the same ids; None: with the library itself."""
        self._fast = backend

    def _id_of(self, token: str, setting: str) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            special = [added.content for added in self._tokenizer.get_added_tokens_decoder().values() if added.special]
            known = ", ".join(special[:8]) or "none"
            raise DataPrepError(
                f"{self._path}: has no token {token!r}; set {setting} to one it has (special ones: {known})"
            )
        return token_id

    def _padding_id(self, settings: TokenizerSettings, pads: bool) -> int:
        """The id of padding; NO_TOKEN where there is none, none was asked for, and none is needed."""
        asked = settings.padding != TokenizerSettings.model_fields["padding"].default
        if not pads and not asked and self._tokenizer.token_to_id(settings.padding) is None:
            return NO_TOKEN
        return self._id_of(settings.padding, "padding")

    def _unknown_id(self) -> int | None:
        """What the model gives for what it does not know; None where it knows every byte."""
        model = self.content["model"]
        if model.get("unk_id") is not None:
            return model["unk_id"]
        token = model.get("unk_token")
        return None if token is None else self._tokenizer.token_to_id(token)

    def encode(self, texts: list[str]) -> list[np.ndarray | TooLong]:
        """Token ids of each document, with the end-of-text id after its last token.

        Args:
            texts: documents.

        Returns:
            One array per document, of type `token_dtype`, shape (tokens + 1,); TooLong in the place of one that would
            have to be encoded at once and is too long for that.

        Raises:
            DataPrepError: the text of a document makes the token of a boundary.
        """
        end = np.array([self.end_of_text_id], dtype=self.token_dtype)
        short = [text for text in texts if len(text) <= PIECE]
        ids_of_short = iter(self._ids(short))
        encoded: list[np.ndarray | TooLong] = []
        for text in texts:
            try:
                parts = [next(ids_of_short)] if len(text) <= PIECE else list(self._ids_in_pieces(text))
            except TooLong as error:
                encoded.append(error)
                continue
            ids = np.concatenate([*parts, end])
            encoded.append(self._without_boundaries(text, end) if self._forges(ids[:-1]) else ids)
        return encoded

    def _ids(self, texts: list[str]) -> list[np.ndarray]:
        if self._fast is None:
            return self.ids_of_the_library(texts)
        found = self._fast.encode(texts)
        left = [text for text, ids in zip(texts, found, strict=True) if ids is None]
        others = iter(self.ids_of_the_library(left) if left else ())
        return [next(others) if ids is None else ids.astype(self.token_dtype) for ids in found]

    def ids_of_the_library(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text by the tokenizers library, of type `token_dtype`, shape (tokens,)."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.token_dtype) for encoding in encodings]

    def _ids_in_pieces(self, text: str) -> Iterator[np.ndarray]:
        """Ids of a long text. Without words before its merges a tokenizer's tokens may depend on all that follows."""
        if self._tokenizer.pre_tokenizer is None:
            if len(text) > LONGEST_PIECE:
                raise TooLong(f"a tokenizer without a pre-tokenizer encodes it at once, {LONGEST_PIECE:,} is the most")
            return iter(self._ids([text]))
        pieces = pieces_of(text, lambda texts: [ids.tolist() for ids in self._ids(texts)])
        return (self._ids([piece])[0] for piece in pieces)

    def _forges(self, ids: np.ndarray) -> bool:
        """Whether the ids of a text have one that only packing may write."""
        return bool(((ids == self.end_of_text_id) | (ids == self.padding_id)).any())

    def _without_boundaries(self, text: str, end: np.ndarray) -> np.ndarray:
        """As `encode`, for a text that has the token of a boundary as a word that the model itself knows.

        Raises:
            DataPrepError: it makes that token even in pieces.
        """
        inside = "|".join(f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in self._boundaries)
        ids = np.concatenate([*self._ids(re.split(inside, text)), end])
        if self._forges(ids[:-1]):
            raise DataPrepError(
                f"{self._path}: makes {' or '.join(map(repr, self._boundaries))} of the text of a document, which "
                "would end or empty it; set end_of_text and padding to tokens that no text makes"
            )
        return ids

    def decode(self, tokens: np.ndarray) -> str:
        """Text of token ids, shape (tokens,), special tokens written out."""
        return self._tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


def _make_special(content: dict[str, Any], tokens: tuple[str, ...]) -> None:
    """Marks added tokens as special: those alone are never made of text."""
    for added in content.get("added_tokens", []):
        added["special"] = added["special"] or added["content"] in tokens
