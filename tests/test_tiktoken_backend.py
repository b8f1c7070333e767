"""tiktoken in place of tokenizers: the same ids and shards, or said why not."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from cola_megatron.config import resolve_tree
from cola_megatron.data import read_manifest
from data_prep import tiktoken_backend
from data_prep.prepare import prepare, said_at_the_end
from data_prep.recipe import Recipe
from data_prep.tiktoken_backend import (
    GPT2_PATTERN,
    LONGEST_TEXT,
    BytePairs,
    Differs,
    TiktokenBackend,
    byte_pairs_of,
    proof_of,
    telling_texts,
)
from data_prep.tokenizer import train_tokenizer
from tests.real_documents import real_documents

pytest.importorskip("tiktoken", reason="the extra `prep` is not installed")


def content_of(tokenizer: Tokenizer) -> dict:
    return json.loads(tokenizer.to_str())


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(real_documents(60), 1200, "<|endoftext|>", "<|pad|>")


def random_merges(seed: int) -> Tokenizer:
    """Merges that no training would give: tokens with several pairs, and pairs that come after what undoes them."""
    chooser = random.Random(seed)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens, merges = list("abc"), []
    for _ in range(40):
        pair = chooser.choice(tokens), chooser.choice(tokens)
        if pair not in merges and len("".join(pair)) < 9:
            merges.append(pair)
            tokens.append("".join(pair))
    names = list(dict.fromkeys([*alphabet, *tokens]))
    chooser.shuffle(names)
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def test_any_merges_give_the_same_ids() -> None:
    chooser = random.Random(1)
    refused = 0
    for seed in range(100):
        tokenizer = random_merges(seed)
        try:
            backend = TiktokenBackend(byte_pairs_of(content_of(tokenizer)))
        except Differs:
            refused += 1
            continue
        for _ in range(40):
            text = "".join(chooser.choices("abc", k=chooser.randint(1, 60)))
            (found,) = backend.encode([text])
            assert found is not None
            assert found.tolist() == ids_of(tokenizer, text), (seed, text)
    assert refused < 90


def test_a_trained_tokenizer_gives_the_same_ids_after_it_was_stored(trained: Tokenizer, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tiktoken_backend, "PLANES", 0)
    byte_pairs_of(content_of(trained)).save(tmp_path / "pairs")
    backend = TiktokenBackend(BytePairs.load(tmp_path / "pairs", content_of(trained)), threads=2)
    texts = [*telling_texts(["<|pad|>"]), *real_documents(40), "", "one <|endoftext|> two"]
    trained.encode_special_tokens = True
    for text, found in zip(texts, backend.encode(texts), strict=True):
        assert found is not None
        assert found.tolist() == ids_of(trained, text)
    assert backend.encode(["a" * (LONGEST_TEXT + 1)]) == [None]


def test_texts_with_an_added_token_are_left_to_tokenizers(trained: Tokenizer) -> None:
    content = content_of(trained)
    content["added_tokens"].append(content["added_tokens"][0] | {"content": "<br>", "special": False})
    backend = TiktokenBackend(byte_pairs_of(content))
    assert [found is None for found in backend.encode(["a <br> b", "a <b> c"])] == [True, False]


def other_words(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()


def with_a_normaliser(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.NFC()


def with_a_space(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_words, "its words are not bytes"),
        (with_a_normaliser, "a normaliser"),
        (with_a_space, "begin with a space"),
    ],
)
def test_other_tokenizers_are_refused(change, reason: str) -> None:
    tokenizer = random_merges(0)
    change(tokenizer)
    with pytest.raises(Differs, match=reason):
        byte_pairs_of(content_of(tokenizer))


def test_ids_that_differ_are_no_proof(trained: Tokenizer) -> None:
    content = content_of(trained)
    backend = TiktokenBackend(byte_pairs_of(content))
    pattern = GPT2_PATTERN.replace(r" ?\p{L}+", r"\p{L}+")
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    trained = Tokenizer.from_str(trained.to_str())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )

    def encode(texts: list[str]) -> list[np.ndarray]:
        return [np.array(ids_of(trained, text)) for text in texts]

    assert proof_of(backend, encode, ["words", "more"])["texts"] == 2
    with pytest.raises(Differs, match=r"of text 1 of the sample"):
        proof_of(backend, encode, ["words", "of the words"])
    assert proof_of(TiktokenBackend(byte_pairs_of(content_of(trained))), encode, ["of the words"])["texts"] == 1


def prepared(folder: Path, name: str, **tokenizer: object) -> Path:
    path = folder / "text.jsonl"
    if not path.exists():
        texts = [*real_documents(50), "one <|endoftext|> two <|pad|>", "word " * 60_000, " " * (LONGEST_TEXT + 9)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tree = {
        "output": str(folder / name),
        "sources": [{"name": "text", "inputs": [str(path)]}],
        "tokenizer": tokenizer,
        "packing": {"sequence_length": 64},
        "task_bytes": 2**16,
    }
    return prepare(resolve_tree(Recipe, tree), progress=False)


def test_shards_are_the_same_by_either_backend(trained: Tokenizer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tiktoken_backend, "PLANES", 0)
    trained.save(str(tmp_path / "t.json"))
    plain = prepared(tmp_path, "plain", path=str(tmp_path / "t.json"), backend="tokenizers")
    fast = prepared(tmp_path, "fast", path=str(tmp_path / "t.json"), backend="tiktoken")
    one, other = read_manifest(plain), read_manifest(fast)
    assert one.fingerprint == other.fingerprint
    assert {**one.files, "report.json": None} == {**other.files, "report.json": None}
    reports = [json.loads((folder / "report.json").read_text()) for folder in (plain, fast)]
    assert reports[0]["sources"] == reports[1]["sources"]
    backend = reports[1]["tokenizer_backend"]
    assert backend["name"] == "tiktoken"
    assert backend["proof"]["texts"] > 100
    assert len(backend["proof"]["sha256_of_ids"]) == 64
    assert reports[0]["tokenizer_backend"] == {"name": "tokenizers", "reason": "asked for"}


def test_a_tokenizer_that_tiktoken_cannot_be_falls_back_with_a_line(tmp_path: Path) -> None:
    tokenizer = random_merges(0)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|pad|>"])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(str(tmp_path / "t.json"))
    folder = prepared(tmp_path, "out", path=str(tmp_path / "t.json"), backend="tiktoken", round_trip_share=0)
    assert said_at_the_end(folder)[1] == "encoded by tokenizers, not by the faster tiktoken: it has a normaliser"
