"""Training, opening and applying the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep.errors import DataPrepError

__all__ = ["DocumentTokenizer", "train_tokenizer"]

END_OF_MESSAGE = "<|im_end|>"


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

    def __init__(self, path: Path, end_of_text: str, padding: str) -> None:
        """
        Args:
            path: a tokenizer.json of the Hugging Face tokenizers library.
            end_of_text: token that ends a document.
            padding: token of padding.

        Raises:
            DataPrepError: the file is missing or not a tokenizer, or does not know one of the two tokens.
        """
        try:
            # Through Python, as the library reports every fault as a bare Exception.
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataPrepError(f"{path}: the tokenizer cannot be read ({error}); check --tokenizer") from error
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as error:
            raise DataPrepError(f"{path}: not a tokenizer.json ({error}); check --tokenizer") from error
        self.end_of_text_id = self._id_of(end_of_text, "end_of_text", path)
        self.padding_id = self._id_of(padding, "padding", path)
        self.unknown_id = self._unknown_id()
        # Not the number of tokens: ids may have gaps.
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.token_dtype = "uint16" if self.vocab_size <= 2**16 else "uint32"
        # A document that contains the text of a special token must not be able to forge a document boundary.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def _id_of(self, token: str, setting: str, path: Path) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            special = [added.content for added in self._tokenizer.get_added_tokens_decoder().values() if added.special]
            known = ", ".join(special[:8]) or "none"
            raise DataPrepError(f"{path}: has no token {token!r}; set {setting} to one it has (special ones: {known})")
        return token_id

    def _unknown_id(self) -> int | None:
        """What the model gives for what it does not know; None where it knows every byte."""
        model = json.loads(self._tokenizer.to_str())["model"]
        if model.get("unk_id") is not None:
            return model["unk_id"]
        token = model.get("unk_token")
        return None if token is None else self._tokenizer.token_to_id(token)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each document, with the end-of-text id after its last token.

        Args:
            texts: documents.

        Returns:
            One array per document, of type `token_dtype`, shape (tokens + 1,).
        """
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*encoding.ids, self.end_of_text_id], dtype=self.token_dtype) for encoding in encodings]

    def decode(self, tokens: np.ndarray) -> str:
        """Text of token ids, shape (tokens,), special tokens written out."""
        return self._tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
