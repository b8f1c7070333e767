"""Preparation of data, from files on disk to shards on disk."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from cola_megatron.config import ConfigError, resolve_tree
from cola_megatron.data import ShardError, TokenShards, read_manifest
from data_prep import embedded_corpus
from data_prep.errors import DataPrepError
from data_prep.pack import split_of
from data_prep.plan import make_plan
from data_prep.prepare import begin, prepare
from data_prep.recipe import Recipe
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


def split_at(text: str, held_out_fraction: float, seed: int) -> str:
    return split_of(text, settings_for("embedded", Path("out"), held_out_fraction=held_out_fraction, seed=seed))


TOKENIZER_OPTIONS = {
    "tokenizer": "path",
    "vocab_size": "vocab_size",
    "end_of_text": "end_of_text",
    "padding": "padding",
}


def settings_for(source: Path | str, output: Path, **changes: object) -> Recipe:
    """A recipe of one source; options by the names that they have on the command line."""
    values = {"sequence_length": 32, "vocab_size": 300, "held_out_fraction": 0.2, "shard_size_bytes": 4096} | changes
    tokenizer = {key: values.pop(name) for name, key in TOKENIZER_OPTIONS.items() if name in values}
    packing = {name: values.pop(name) for name in ("sequence_length", "method", "open_sequences") if name in values}
    shards = {"size_bytes": values.pop("shard_size_bytes"), "format": values.pop("shard_format", "mds")}
    shards["compression"] = values.pop("compression", None)
    one = {"name": "text", "inputs": [str(source)]}
    for name in ("text_field", "max_tokens", "bad_documents", "format"):
        if name in values:
            one[name] = values.pop(name)
    sections = {"tokenizer": {**tokenizer, "round_trip_share": 1.0}, "packing": packing, "shards": shards}
    return resolve_tree(Recipe, {"output": str(output), "sources": [one], **sections, **values})


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
    report = json.loads((output / "report.json").read_text())["sources"]["text"]
    assert report["parts"] == 4
    assert report["kept"] == {"documents": 60, "characters": sum(map(len, texts))}
    assert report["round_trip"] == {"checked": 60, "different": 0, "examples": []}
    assert sum(report["lengths"].values()) == 60
    for name in ("train", "held_out"):
        expected = [text for text in texts if split_at(text, 0.2, 66) == name]
        found = texts_in(output, name)
        assert sum(text in found for text in expected) >= len(expected) - 1, "the last document may be cut"
        record = manifest.total(name)
        assert (record.documents, record.characters) == (len(expected), sum(map(len, expected)))
        assert record.tokens == record.sequences * 32 == TokenShards(output, name).tokens
        assert record.dropped_tokens < 32
    assert len(list((output / "train").rglob("shard.*.mds"))) > 1


def test_special_tokens_in_a_document_are_only_text(tmp_path: Path) -> None:
    text = "a page about <|endoftext|> and <|pad|> tokens. " * 20
    source = write_jsonl(tmp_path / "a.jsonl", [text] * 3)
    output = run(source, tmp_path / "out", held_out_fraction=0.0, vocab_size=270)
    assert texts_in(output, "train")[0] == text
    assert read_manifest(output).splits["held_out"] == {}


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
    assert prepare(settings_for(corpus, tmp_path / "out")) == output
    assert "already prepared" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "out"]


def test_other_settings_or_sources_are_refused_without_force(tmp_path: Path, corpus: Path) -> None:
    output = run(corpus, tmp_path / "out")
    before = files_of(output)
    with pytest.raises(
        DataPrepError, match=r"packing\.sequence_length is 32 there and 64 here.*--output.*--force"
    ) as caught:
        run(corpus, output, sequence_length=64)
    assert "\n" not in str(caught.value)
    with corpus.open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(DataPrepError, match=r"source text: [\d,]+ bytes now, [\d,]+ then"):
        run(corpus, output)
    assert files_of(output) == before
    prepare(settings_for(corpus, output, sequence_length=64), progress=False, force=True)
    assert TokenShards(output, "train").sequence_length == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "out"]


def test_a_damaged_finished_folder_is_not_called_finished(tmp_path: Path, corpus: Path) -> None:
    output = run(corpus, tmp_path / "out")
    (output / "train" / "text" / "00000" / "shard.00000.mds").unlink()
    with pytest.raises(DataPrepError, match=r"train/text/00000/shard\.00000\.mds is missing; .*--force"):
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
    with pytest.raises(DataPrepError, match=r"tokenizer\.path is .*given\.json there and None here"):
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
    totals = [manifest.total(name) for name in manifest.splits]
    assert sum(total.tokens + total.dropped_tokens for total in totals) == 1000
    assert 0 < sum(total.documents for total in totals) < 60


def test_empty_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["", *(document(seed) for seed in range(30)), ""])
    report = json.loads((run(source, tmp_path / "out") / "report.json").read_text())["sources"]["text"]
    assert report["removed"] == {"empty": 2}
    assert (report["read"]["documents"], report["kept"]["documents"]) == (32, 30)


def test_a_document_keeps_its_split_when_the_corpus_grows() -> None:
    texts = [document(seed, words=8) for seed in range(2000)]
    held_out = {text for text in texts[:1000] if split_at(text, 0.1, 66) == "held_out"}
    assert {text for text in texts if split_at(text, 0.1, 66) == "held_out"} & set(texts[:1000]) == held_out
    assert 60 < len(held_out) < 140
    assert held_out != {text for text in texts[:1000] if split_at(text, 0.1, 67) == "held_out"}
    assert held_out < {text for text in texts[:1000] if split_at(text, 0.3, 66) == "held_out"}


def test_the_embedded_corpus_is_over_a_megabyte_of_distinct_documents() -> None:
    texts = embedded_corpus.collect()
    assert sum(map(len, texts)) > 1_000_000
    assert len(set(texts)) == len(texts) > 1000


def test_the_embedded_corpus_can_be_prepared(tmp_path: Path) -> None:
    output = run("embedded", tmp_path / "out", max_tokens=20_000)
    assert verify(output, progress=False).sequences in (20_000 // 32 - 1, 20_000 // 32), "each split drops its tail"


@pytest.mark.parametrize("given", [False, True], ids=["training a tokenizer", "given tokenizer"])
def test_a_bad_source_is_named_and_once_repaired_the_rest_is_not_read_again(tmp_path: Path, given: bool) -> None:
    texts = [document(seed) for seed in range(60)]
    (tmp_path / "in").mkdir()
    options = {"task_bytes": 10_000}  # a task for each file
    for number in range(3):
        write_jsonl(tmp_path / "in" / f"{number}.jsonl", texts[20 * number : 20 * number + 20])
    changes = dict(options)
    if given:
        changes |= {"tokenizer": run(tmp_path / "in", tmp_path / "first") / "tokenizer.json"}
    bad = tmp_path / "in" / "1.jsonl"
    good = bad.read_bytes()
    bad.write_bytes(good + b'{"text": "cut')
    with pytest.raises(DataPrepError, match=r"1\.jsonl:21: not valid JSON \(Unterminated") as caught:
        run(tmp_path / "in", tmp_path / "out", **changes)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    done = tmp_path / "out.work" / "tokenize" / "00000"
    before = done.stat().st_mtime_ns if given else None
    bad.write_bytes(good)
    output = run(tmp_path / "in", tmp_path / "out", **changes)
    assert not (tmp_path / "out.work").exists()
    assert given == (before is not None)
    assert files_of(output) == files_of(run(tmp_path / "in", tmp_path / "again", **changes))


def test_work_with_another_tokenizer_of_the_same_name_is_not_taken_over(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(2):
        shutil.copy(corpus, tmp_path / "in" / f"{number}.jsonl")
    (tmp_path / "in" / "1.jsonl").write_bytes(corpus.read_bytes() + b"{")
    given = tmp_path / "given.json"
    shutil.copy(run(corpus, tmp_path / "first") / "tokenizer.json", given)
    options = {"tokenizer": given, "task_bytes": 1 + corpus.stat().st_size}
    with pytest.raises(DataPrepError, match="not valid JSON"):
        run(tmp_path / "in", tmp_path / "out", **options)
    given.write_text(json.dumps(json.loads(given.read_text())))
    with pytest.raises(
        DataPrepError, match=r"unfinished work of another preparation \(the tokenizer .*given\.json has changed\)"
    ):
        run(tmp_path / "in", tmp_path / "out", **options)


def test_bad_documents_can_be_skipped_and_are_counted(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [document(seed) for seed in range(40)])
    with source.open("ab") as file:
        file.write(b'{"text": "cut\n{"body": "x"}\n')
    output = run(source, tmp_path / "out", bad_documents="skip")
    report = json.loads((output / "report.json").read_text())["sources"]["text"]
    assert sum(report["removed"].values()) == 2 and set(report["removed"]) == {"bad_json", "bad_field"}
    assert report["kept"]["documents"] == 40


def test_a_missing_source_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataPrepError, match=r"absent\.txt: does not exist"):
        run(tmp_path / "absent.txt", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 100}, r"vocab_size 100: a byte-level tokenizer has at least 259 tokens"),
        ({"vocab_size": 50_000}, r"vocab_size 50000: the train documents yield at most \d+; lower it"),
        ({"sequence_length": 100_000, "shard_size_bytes": 2**26}, r"fill a sequence of 100000 tokens .*give more text"),
        ({"text_field": "body"}, r"corpus\.jsonl:1: no field 'body' \(fields: text\); set text_field"),
    ],
)
def test_settings_that_the_corpus_cannot_meet(
    tmp_path: Path, corpus: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(DataPrepError, match=message):
        run(corpus, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


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
    [
        {"sequence_length": 0},
        {"held_out_fraction": 1.0},
        {"shard_size_bytes": 100},
        {"colour": "red"},
        {"open_sequences": 0},
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_for("embedded", tmp_path, **changes)
    assert next(iter(changes)).replace("shard_", "shards.") in str(caught.value)


def test_a_full_disk_is_one_clear_error_and_the_run_goes_on_when_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [document(seed) for seed in range(1500)])
    whole = run(source, tmp_path / "whole")
    with small_disk(tmp_path / "disk", kilobytes=1200) as disk:
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(1_100_000))
        with pytest.raises(DataPrepError, match=r"no space left on .*; free some") as caught:
            run(source, disk / "out")
        assert not (disk / "out").exists()
        ballast.unlink()
        assert files_of(run(source, disk / "out")) == files_of(whole)
    assert "\n" not in str(caught.value)
    assert caplog.records == [], "no traceback of a writer thread beside the error"


def test_verify_names_every_bad_file(tmp_path: Path, corpus: Path) -> None:
    output = run(corpus, tmp_path / "out")
    report = verify(output, progress=False)
    manifest = read_manifest(output)
    assert report.ok
    assert report.sequences == sum(manifest.total(name).sequences for name in manifest.splits)
    first, second = sorted((output / "train").rglob("shard.*.mds"))[:2]
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


@pytest.mark.parametrize("shard_format", ["mds", "webdataset"])
@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("method", ["cut_and_fill", "best_fit"])
def test_every_format_holds_the_same_sequences(
    tmp_path: Path, corpus: Path, shard_format: str, compression: str | None, method: str
) -> None:
    options = {"method": method, "shard_size_bytes": 12_000}
    plain = TokenShards(run(corpus, tmp_path / "plain", **options), "train")
    output = run(corpus, tmp_path / "out", shard_format=shard_format, compression=compression, **options)
    shards = TokenShards(output, "train")
    assert np.array_equal(
        np.stack([*map(shards.__getitem__, range(len(shards)))]), np.stack([*map(plain.__getitem__, range(len(plain)))])
    )
    assert verify(output, progress=False).ok
    total = read_manifest(output).total("train")
    assert (total.padding_tokens == 0) == (method == "cut_and_fill")
    assert total.dropped_tokens == 0 or method == "cut_and_fill"


def test_best_fit_keeps_documents_whole(tmp_path: Path) -> None:
    texts = [document(seed, words=2 + seed % 9) for seed in range(300)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    output = run(
        source, tmp_path / "out", method="best_fit", sequence_length=256, shard_size_bytes=8192, held_out_fraction=0
    )
    shards = TokenShards(output, "train")
    sequences = [shards[index] for index in range(len(shards))]
    for sequence in sequences:
        content = sequence[sequence != shards.padding_id]
        assert content[-1] == shards.end_of_text_id, "no document is cut"
        assert (sequence[len(content) :] == shards.padding_id).all(), "padding stands at the end"
    parts = [np.split(sequence, np.flatnonzero(sequence == shards.end_of_text_id) + 1) for sequence in sequences]
    tokenizer = Tokenizer.from_file(str(shards.tokenizer_path))
    special = (shards.end_of_text_id, shards.padding_id)
    found = [tokenizer.decode(part[~np.isin(part, special)].tolist()) for each in parts for part in each]
    assert sorted(filter(None, found)) == sorted(texts)
    total = read_manifest(output).total("train")
    assert total.padding_tokens / total.tokens < 0.05


def test_work_that_a_process_is_at_is_not_removed(tmp_path: Path, corpus: Path) -> None:
    plan = make_plan(settings_for(corpus, tmp_path / "out"))
    work = begin(plan)
    other = settings_for(corpus, tmp_path / "out", sequence_length=64)
    with work.in_use():
        for force in (False, True):
            with pytest.raises(DataPrepError, match=r"out\.work: another process is at work there; wait for it"):
                prepare(other, progress=False, force=force)
        assert begin(plan).path == work.path, "any number of processes do the same work"
    prepare(other, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "out"]
