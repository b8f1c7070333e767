"""Documents of any length: the tokens of the whole, in bounded memory, and none of them the held-out split."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from cola_megatron.data import read_manifest
from data_prep import pieces, tokenizer
from data_prep.errors import DataPrepError
from data_prep.recipe import TokenizerSettings
from data_prep.tokenizer import DocumentTokenizer, TooLong, train_tokenizer
from tests.test_data_prep import document, run, write_jsonl

ALPHABETS = [
    "abcdefgh",
    "éßñ",
    "北風と太陽",
    "0123456789",
    ".,;:!?-()",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "😀",
    "'s",
]


def mixed_text(characters: int) -> str:
    chooser = random.Random(0)
    found: list[str] = []
    while sum(map(len, found)) < characters:
        alphabet = chooser.choice(ALPHABETS)
        found.append(alphabet if alphabet.isspace() else "".join(chooser.choices(alphabet, k=chooser.randrange(1, 9))))
        found.append(chooser.choice(["", " "]))
    return "".join(found)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (pieces, tokenizer):
        monkeypatch.setattr(module, "PIECE", 300)
        monkeypatch.setattr(module, "LONGEST_PIECE", 3000)


def opened(folder: Path, given: Tokenizer) -> DocumentTokenizer:
    given.save(str(folder / "t.json"))
    return DocumentTokenizer(folder / "t.json", TokenizerSettings())


@pytest.mark.parametrize("pattern", ["gpt2", "words", "metaspace"])
def test_pieces_have_the_tokens_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_pieces: None, pattern: str
) -> None:
    text = mixed_text(30_000)
    given = train_tokenizer([text], 700, "<|endoftext|>", "<|pad|>")
    if pattern == "words":
        given.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(" ", "merged_with_next"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    elif pattern == "metaspace":
        given.pre_tokenizer, given.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    given.post_processor = processors.ByteLevel(trim_offsets=False)
    whole = given.encode(text, add_special_tokens=False).ids
    count = 0

    def counted(*arguments: object) -> object:
        nonlocal count
        for piece in pieces.pieces_of(*arguments):
            count += 1
            yield piece

    monkeypatch.setattr(tokenizer, "pieces_of", counted)
    monkeypatch.setattr(pieces, "LONGEST_PIECE", 10**6)
    (ids,) = opened(tmp_path, given).encode([text])
    assert ids[:-1].tolist() == whole
    assert count > 20


def test_what_cannot_be_cut_is_encoded_at_once_or_named(tmp_path: Path, small_pieces: None) -> None:
    given = train_tokenizer([mixed_text(3000)], 300, "<|endoftext|>", "<|pad|>")
    tokens = opened(tmp_path, given)
    short, long = tokens.encode(["x" * 2000, "x" * 4000])
    assert len(short) == 2001 and isinstance(long, TooLong)
    without_words = Tokenizer(models.BPE({"<|endoftext|>": 0, "<|pad|>": 1, "a": 2, " ": 3}, []))
    short, long = opened(tmp_path, without_words).encode(["a " * 1000, "a " * 2000])
    assert len(short) == 2001 and isinstance(long, TooLong)


def test_a_document_that_is_too_long_is_named_or_counted(tmp_path: Path, small_pieces: None) -> None:
    texts = [document(seed, words=20) for seed in range(60)]
    source = write_jsonl(tmp_path / "a.jsonl", [*texts, "x" * 4000])
    with pytest.raises(DataPrepError, match=r"a\.jsonl:61: 4,000 characters are too long for one document \(no words"):
        run(source, tmp_path / "out")
    output = run(source, tmp_path / "skipped", bad_documents="skip")
    assert '"too_long": 1' in (output / "report.json").read_text()


def test_memory_is_bounded_by_the_text(tmp_path: Path) -> None:
    text = mixed_text(20_000) * 50
    tokens = opened(tmp_path, train_tokenizer([text[:20_000]], 700, "<|endoftext|>", "<|pad|>"))
    tracemalloc.start()
    (ids,) = tokens.encode([text])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(ids, np.ndarray) and peak < 12 * len(text)


def test_a_long_document_is_not_the_held_out_split(tmp_path: Path) -> None:
    long = [" ".join(document(seed) for _ in range(300)) for seed in range(6)]
    source = write_jsonl(tmp_path / "a.jsonl", [*(document(seed) for seed in range(100)), *long])
    manifest = read_manifest(run(source, tmp_path / "out", held_out_fraction=0.5))
    held_out, train = manifest.total("held_out"), manifest.total("train")
    assert train.documents > 40 and held_out.documents > 30 and held_out.sequences < train.sequences / 10
