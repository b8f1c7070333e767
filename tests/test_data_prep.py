"""Preparation of data, from files on disk to shards on disk."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer

from cola_megatron.data import ShardError, TokenShards, read_manifest
from data_prep import embedded_corpus
from data_prep.errors import DataPrepError
from data_prep.pack import split_of
from data_prep.prepare import PrepSettings, prepare
from data_prep.verify import verify
from tests.support import small_disk

WORDS = ["ship", "sailed", "slowly", "north", "while", "grey", "water", "broke", "over", "iron", "nobody", "spoke"]


def document(seed: int, words: int = 60) -> str:
    """A paragraph of repeatable words, with characters of several bytes and a carriage return."""
    picks = np.random.default_rng(seed).integers(0, len(WORDS), words)
    return " ".join(WORDS[pick] for pick in picks) + f". Nº {seed}: été 😀\r\n"


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def settings_for(source: Path | str, output: Path, **changes: object) -> PrepSettings:
    values = {"sequence_length": 32, "vocab_size": 300, "held_out_fraction": 0.2, "shard_size_bytes": 4096}
    return PrepSettings(inputs=[str(source)], output=output, **(values | changes))


def run(source: Path | str, output: Path, **changes: object) -> Path:
    return prepare(settings_for(source, output, **changes), progress=False)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the manifest (which names folders and times)."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def texts_in(folder: Path, split: str) -> list[str]:
    """The documents that a split's sequences decode to; the last may be cut."""
    shards = TokenShards(folder, split)
    ids = np.concatenate([shards[index] for index in range(len(shards))])
    ends = np.flatnonzero(ids == shards.end_of_text_id)
    tokenizer = Tokenizer.from_file(str(shards.tokenizer_path))
    return [tokenizer.decode(part[part != shards.end_of_text_id].tolist()) for part in np.split(ids, ends + 1)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", [document(seed) for seed in range(60)])


def test_documents_survive_the_way_through_tokenizer_and_shards(tmp_path: Path) -> None:
    texts = [document(seed) for seed in range(60)]
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_bytes(texts[0].encode())
    (folder / "b.MD").write_bytes(texts[1].encode())
    (folder / "skipped.csv").write_text("not text")
    write_jsonl(folder / "c.jsonl", texts[2:30])
    lines = "\n\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts[30:])
    (folder / "deep" / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))

    output = run(folder, tmp_path / "out")

    manifest = read_manifest(output)
    assert (manifest.vocab_size, manifest.end_of_text_id, manifest.padding_id) == (300, 0, 2)
    assert manifest.token_dtype == "uint16"
    assert [source.documents for source in manifest.sources] == [1, 1, 28, 30]
    assert sum(source.characters for source in manifest.sources) == sum(map(len, texts))
    for name in ("train", "held_out"):
        expected = [text for text in texts if split_of(text, 0.2, 66) == name]
        *whole, last = texts_in(output, name)
        assert whole == expected[: len(whole)]
        assert len(whole) >= len(expected) - 1, "at most the last document is cut"
        # A cut inside a character decodes to U+FFFD.
        assert "".join(expected[len(whole) :]).startswith(last.rstrip("\ufffd"))
        record = manifest.splits[name]
        assert (record.documents, record.characters) == (len(expected), sum(map(len, expected)))
        assert record.tokens == record.sequences * 32 == TokenShards(output, name).tokens
        assert record.dropped_tokens < 32
    assert len(list((output / "train").glob("shard.*.mds"))) > 1


def test_special_tokens_in_a_document_are_only_text(tmp_path: Path) -> None:
    text = "a page about <|endoftext|> and <|pad|> tokens. " * 20
    source = write_jsonl(tmp_path / "a.jsonl", [text] * 3)
    output = run(source, tmp_path / "out", held_out_fraction=0.0, vocab_size=270)
    assert texts_in(output, "train")[0] == text
    assert read_manifest(output).splits["held_out"].documents == 0


def test_two_runs_are_byte_identical(tmp_path: Path, corpus: Path) -> None:
    first, second = run(corpus, tmp_path / "one"), run(corpus, tmp_path / "two")
    assert files_of(first) == files_of(second)
    assert verify(first, progress=False).ok


def test_a_finished_folder_is_left_alone_and_says_so(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = prepare(settings_for(corpus, tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    capsys.readouterr()
    os.utime(corpus)  # the same content at another time is the same source
    assert prepare(settings_for(corpus, tmp_path / "out")) == output
    assert "already prepared" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "out"]


def test_other_settings_or_sources_are_refused_without_force(tmp_path: Path, corpus: Path) -> None:
    output = run(corpus, tmp_path / "out")
    before = files_of(output)
    with pytest.raises(DataPrepError, match=r"sequence_length is 32 there and 64 here.*--output.*--force") as caught:
        run(corpus, output, sequence_length=64)
    assert "\n" not in str(caught.value)
    with corpus.open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(DataPrepError, match=r"corpus\.jsonl has changed"):
        run(corpus, output)
    assert files_of(output) == before
    prepare(settings_for(corpus, output, sequence_length=64), progress=False, force=True)
    assert TokenShards(output, "train").sequence_length == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "out"]


def test_a_damaged_finished_folder_is_not_called_finished(tmp_path: Path, corpus: Path) -> None:
    output = run(corpus, tmp_path / "out")
    (output / "train" / "shard.00000.mds").unlink()
    with pytest.raises(DataPrepError, match=r"train/shard\.00000\.mds is missing; .*--force"):
        run(corpus, output)


@pytest.mark.parametrize("force", [False, True])
def test_a_foreign_folder_is_never_overwritten(tmp_path: Path, corpus: Path, force: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataPrepError, match=r"not a prepared folder; choose another --output"):
        prepare(settings_for(corpus, tmp_path / "out"), progress=False, force=force)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_a_given_tokenizer_is_used_as_it_is(tmp_path: Path, corpus: Path) -> None:
    trained = run(corpus, tmp_path / "first") / "tokenizer.json"
    given = tmp_path / "given.json"
    given.write_text(json.dumps(json.loads(trained.read_text())))  # the same tokenizer in other bytes
    output = run(corpus, tmp_path / "second", tokenizer=given, vocab_size=9999)
    assert (output / "tokenizer.json").read_bytes() == given.read_bytes()
    assert texts_in(output, "train") == texts_in(tmp_path / "first", "train")
    assert run(corpus, output, tokenizer=given, vocab_size=1111) == output, "vocab_size is for training only"
    with pytest.raises(DataPrepError, match=r"tokenizer is .*given\.json there and trained here"):
        run(corpus, output)


def test_large_vocabularies_are_stored_as_uint32(tmp_path: Path, corpus: Path) -> None:
    content = json.loads((run(corpus, tmp_path / "first") / "tokenizer.json").read_text())
    content["model"]["vocab"]["rare"] = 70_000
    given = tmp_path / "given.json"
    given.write_text(json.dumps(content))
    output = run(corpus, tmp_path / "second", tokenizer=given)
    assert (read_manifest(output).token_dtype, read_manifest(output).vocab_size) == ("uint32", 70_001)
    assert texts_in(output, "train") == texts_in(tmp_path / "first", "train")


def test_max_tokens_caps_what_is_read(tmp_path: Path, corpus: Path) -> None:
    manifest = read_manifest(run(corpus, tmp_path / "out", max_tokens=1000))
    assert sum(split.tokens + split.dropped_tokens for split in manifest.splits.values()) == 1000
    assert 0 < manifest.sources[0].documents == sum(split.documents for split in manifest.splits.values()) < 60


def test_empty_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["", *(document(seed) for seed in range(30)), ""])
    manifest = read_manifest(run(source, tmp_path / "out"))
    assert (manifest.empty_documents, manifest.sources[0].documents) == (2, 30)


def test_a_document_keeps_its_split_when_the_corpus_grows() -> None:
    texts = [document(seed, words=8) for seed in range(2000)]
    held_out = {text for text in texts[:1000] if split_of(text, 0.1, 66) == "held_out"}
    assert {text for text in texts if split_of(text, 0.1, 66) == "held_out"} & set(texts[:1000]) == held_out
    assert 60 < len(held_out) < 140
    assert held_out != {text for text in texts[:1000] if split_of(text, 0.1, 67) == "held_out"}
    assert held_out < {text for text in texts[:1000] if split_of(text, 0.3, 66) == "held_out"}


def test_the_embedded_corpus_is_over_a_megabyte_of_distinct_documents() -> None:
    texts = embedded_corpus.collect()
    assert sum(map(len, texts)) > 1_000_000
    assert len(set(texts)) == len(texts) > 1000


def test_the_embedded_corpus_can_be_prepared(tmp_path: Path) -> None:
    output = run("embedded", tmp_path / "out", max_tokens=20_000)
    assert read_manifest(output).sources[0].source == "embedded"
    assert verify(output, progress=False).sequences in (20_000 // 32 - 1, 20_000 // 32), "each split drops its tail"


GOOD = '{"text": "fine"}\n'
BAD_FILES = [
    pytest.param("a.txt", b"one\ntwo \xff\n", r"a\.txt:2: not valid UTF-8 \(byte 0xff\)", id="text not UTF-8"),
    pytest.param("a.jsonl", GOOD.encode() + b'{"text": "\xe9"}', r"a\.jsonl:2: not valid UTF-8", id="JSONL not UTF-8"),
    pytest.param("a.jsonl", GOOD + '{"text": "cut', r"a\.jsonl:2: not valid JSON \(Unterminated", id="broken line"),
    pytest.param("a.jsonl", GOOD + "[1]\n", r"a\.jsonl:2: a JSON list, not an object", id="not an object"),
    pytest.param("a.jsonl", GOOD + '{"body": ""}\n', r"a\.jsonl:2: no field 'text' \(fields: body\)", id="no field"),
    pytest.param("a.jsonl", GOOD + '{"text": 3}\n', r"a\.jsonl:2: field 'text' is a int, not a string", id="number"),
    pytest.param("a.jsonl", GOOD + '{"text": null}\n', r"a\.jsonl:2: field 'text' is a NoneType", id="null"),
    pytest.param("a.jsonl", '{"text": "\\ud800"}\n', r"a\.jsonl:1: an unpaired surrogate", id="surrogate"),
    pytest.param("a.jsonl", '{"text": ' + "9" * 5000 + "}\n", r"a\.jsonl:1: JSON that cannot be read", id="digits"),
    pytest.param("a.jsonl", "\n\n", r"a\.jsonl: holds no document; remove it", id="empty JSONL"),
    pytest.param("a.txt", "", r"a\.txt: holds no text; remove it", id="empty text"),
    pytest.param("a.pdf", "x", r"a\.pdf: unknown kind of file; .*\.jsonl\.gz", id="unknown suffix"),
    pytest.param("a.jsonl.gz", "plain", r"a\.jsonl\.gz: not a whole gzip file", id="not gzip"),
    pytest.param(
        "a.jsonl.gz", gzip.compress(GOOD.encode() * 99)[:-9], r"a\.jsonl\.gz: not a whole gzip file", id="cut gzip"
    ),
]


@pytest.mark.parametrize("given", [False, True], ids=["training a tokenizer", "given tokenizer"])
@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_a_bad_source_is_named_in_one_line(
    tmp_path: Path, name: str, content: bytes | str, message: str, given: bool
) -> None:
    bad = tmp_path / name
    bad.write_bytes(content if isinstance(content, bytes) else content.encode())
    changes = {}
    if given:
        good = write_jsonl(tmp_path / "good.jsonl", [document(seed) for seed in range(30)])
        changes = {"tokenizer": run(good, tmp_path / "first") / "tokenizer.json"}
    with pytest.raises(DataPrepError, match=message) as caught:
        run(bad, tmp_path / "out", **changes)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name], "nothing may be left behind"


def test_a_missing_source_an_empty_folder_and_a_repeated_file_are_refused(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(DataPrepError, match=r"absent\.txt: does not exist; give a file"):
        run(tmp_path / "absent.txt", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataPrepError, match=r"empty: holds no \.txt"):
        run(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(DataPrepError, match=r"corpus\.jsonl: named twice"):
        prepare(PrepSettings(inputs=[str(corpus), str(tmp_path)], output=tmp_path / "out"), progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 100}, r"vocab_size 100: a byte-level tokenizer has at least 259 tokens"),
        ({"vocab_size": 50_000}, r"vocab_size 50000: the train documents yield at most \d+; lower it"),
        ({"sequence_length": 100_000, "shard_size_bytes": 2**26}, r"fewer than one sequence of 100000; give more"),
        ({"text_field": "body"}, r"corpus\.jsonl:1: no field 'body' \(fields: text\); set text_field"),
    ],
)
def test_settings_that_the_corpus_cannot_meet(
    tmp_path: Path, corpus: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(DataPrepError, match=message):
        run(corpus, tmp_path / "out", **changes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl"]


def test_the_largest_vocabulary_named_can_be_reached(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(DataPrepError) as caught:
        run(corpus, tmp_path / "out", vocab_size=50_000)
    reachable = int(re.search(r"at most (\d+)", str(caught.value))[1])
    assert read_manifest(run(corpus, tmp_path / "out", vocab_size=reachable)).vocab_size == reachable


def test_bad_tokenizers(tmp_path: Path, corpus: Path) -> None:
    given = run(corpus, tmp_path / "first") / "tokenizer.json"
    with pytest.raises(DataPrepError, match=r"no token '</s>'; set end_of_text .*<\|endoftext\|>"):
        run(corpus, tmp_path / "out", tokenizer=given, end_of_text="</s>")
    with pytest.raises(DataPrepError, match=r"no token '<pad>'; set padding"):
        run(corpus, tmp_path / "out", tokenizer=given, padding="<pad>")
    with pytest.raises(DataPrepError, match=r"corpus\.jsonl: not a tokenizer\.json"):
        run(corpus, tmp_path / "out", tokenizer=corpus)
    with pytest.raises(DataPrepError, match=r"absent\.json: the tokenizer cannot be read"):
        run(corpus, tmp_path / "out", tokenizer=tmp_path / "absent.json")


@pytest.mark.parametrize(
    "changes",
    [{"sequence_length": 0}, {"held_out_fraction": 1.0}, {"shard_size_bytes": 100}, {"colour": "red"}, {"inputs": []}],
)
def test_impossible_settings_are_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PrepSettings(**({"inputs": ["embedded"], "output": tmp_path} | changes))
    with pytest.raises(ValidationError, match="frozen"):
        PrepSettings(inputs=["embedded"], output=tmp_path).seed = 1


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [document(seed) for seed in range(1500)])
    with small_disk(tmp_path / "disk", kilobytes=128) as disk:
        with pytest.raises(DataPrepError, match=r"out: no space left on .*disk; free some") as caught:
            run(source, disk / "out")
        assert list(disk.iterdir()) == []
    assert "\n" not in str(caught.value)
    assert caplog.records == [], "no traceback of a writer thread beside the error"


def test_verify_names_every_bad_file(tmp_path: Path, corpus: Path) -> None:
    output = run(corpus, tmp_path / "out")
    report = verify(output, progress=False)
    manifest = read_manifest(output)
    assert report.ok
    assert report.sequences == sum(split.sequences for split in manifest.splits.values())
    first, second = sorted((output / "train").glob("shard.*.mds"))[:2]
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    second.unlink()
    (output / "held_out" / "stray.mds").write_bytes(b"x")
    report = verify(output, progress=False)
    assert not report.ok
    assert [line.split(" ")[0] for line in report.problems] == [
        str(first),
        str(second),
        str(output / "held_out" / "stray.mds"),
    ]
    shutil.rmtree(output)
    with pytest.raises(ShardError, match=r"manifest\.json does not exist"):
        verify(output, progress=False)
