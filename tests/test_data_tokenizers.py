"""Tokenizers as they are given: no text makes a boundary, and what cannot be used is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from cola_megatron.data import TokenShards, read_manifest
from cola_megatron.objectives.samples import positions
from data_prep.errors import DataPrepError
from data_prep.recipe import TokenizerSettings
from data_prep.tokenizer import DocumentTokenizer
from tests.test_data_prep import document, run, write_jsonl

FORGERY = "one <|endoftext|> two<|endoftext|>three <|pad|><|im_end|>"


def bytes_tokenizer(path: Path, *added: str, special: bool = False, dropout: float | None = None) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE({character: number for number, character in enumerate(alphabet)}, [], dropout=dropout)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=special) for token in added])
    tokenizer.save(str(path))
    return path


def word_tokenizer(path: Path, *words: str) -> Path:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
    return path


def test_text_makes_no_boundary_where_the_token_is_not_special(tmp_path: Path) -> None:
    given = bytes_tokenizer(tmp_path / "t.json", "<|endoftext|>", "<|pad|>", "<|im_end|>")
    texts = [f"{document(seed)}{FORGERY}" for seed in range(50)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    output = run(source, tmp_path / "out", tokenizer=given, held_out_fraction=0, sequence_length=8)
    shards = TokenShards(output, "train")
    ids = np.concatenate([shards[index] for index in range(len(shards))])
    assert (ids == shards.end_of_text_id).sum() in (49, 50), "the last may be cut"
    assert not np.isin(ids, [shards.padding_id, 258]).any()
    report = json.loads((output / "report.json").read_text())["sources"]["text"]
    assert report["round_trip"] == {"checked": 50, "different": 0, "examples": []}
    assert (output / "tokenizer.json").read_bytes() == given.read_bytes()


def test_text_makes_no_boundary_where_the_token_is_a_word_of_the_model(tmp_path: Path) -> None:
    path = word_tokenizer(tmp_path / "t.json", "<unk>", "</s>", "<pad>", "a")
    tokenizer = DocumentTokenizer(path, TokenizerSettings(end_of_text="</s>", padding="<pad>"))
    (ids,) = tokenizer.encode(["a </s> <pad> a"])
    assert ids.tolist() == [3, 0, 0, 0, 0, 3, 1]


def test_a_boundary_that_any_text_can_make_is_refused(tmp_path: Path) -> None:
    path = word_tokenizer(tmp_path / "t.json", "<|endoftext|>", "<|pad|>", "a")
    tokenizer = DocumentTokenizer(path, TokenizerSettings())
    with pytest.raises(DataPrepError, match=r"t\.json: makes '<\|endoftext\|>' or .* of the text of a document"):
        tokenizer.encode(["a what"])


def test_a_tokenizer_with_dropout_is_refused(tmp_path: Path) -> None:
    path = bytes_tokenizer(tmp_path / "t.json", "<|endoftext|>", "<|pad|>", dropout=0.1)
    with pytest.raises(DataPrepError, match=r"t\.json: has a dropout of 0\.1.*; set model\.dropout to null in it"):
        DocumentTokenizer(path, TokenizerSettings())


def test_a_tokenizer_without_padding_serves_where_nothing_is_padded(tmp_path: Path) -> None:
    given = bytes_tokenizer(tmp_path / "t.json", "<|endoftext|>", special=True)
    source = write_jsonl(tmp_path / "a.jsonl", [document(seed) for seed in range(60)])
    output = run(source, tmp_path / "out", tokenizer=given)
    assert read_manifest(output).padding_id == -1
    shards = TokenShards(output, "train")
    assert positions(shards[0], shards.padding_id, shards.end_of_text_id)["counted"].all()
    with pytest.raises(DataPrepError, match=r"t\.json: has no token '<\|pad\|>'; set padding to one it has"):
        run(source, tmp_path / "other", tokenizer=given, method="best_fit")
