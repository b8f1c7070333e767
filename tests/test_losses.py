"""What a preparation loses is said at its end, and refused where it can hardly be meant."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from cola_megatron.config import resolve_tree
from cola_megatron.data import read_manifest
from cola_megatron.data.run_shards import _say_the_mixture
from data_prep.errors import DataPrepError
from data_prep.prepare import prepare, said_at_the_end
from data_prep.recipe import Recipe
from tests.test_data_prep import document, write_jsonl


def prepared(folder: Path, sources: dict[str, dict[str, object]], **changes: object) -> Path:
    for name, source in sources.items():
        source |= {"name": name, "inputs": source.get("inputs", [str(folder / f"{name}.jsonl")])}
    tree = {
        "output": str(folder / "out"),
        "sources": list(sources.values()),
        "tokenizer": {"vocab_size": 300},
        "packing": {"sequence_length": 32},
    }
    return prepare(resolve_tree(Recipe, tree | changes), progress=False)


def test_a_source_with_a_weight_and_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "large.jsonl", [document(seed) for seed in range(40)])
    write_jsonl(tmp_path / "small.jsonl", ["short"])
    with pytest.raises(DataPrepError, match=r"^source small: has weight 9 and nothing to train on \(1 documents kept"):
        prepared(tmp_path, {"large": {"weight": 1}, "small": {"weight": 9}})
    with pytest.raises(DataPrepError, match=r"^source small: length/short removes 1 of 1 documents \(100\.0%\)"):
        prepared(
            tmp_path / ".",
            {"large": {"weight": 1}, "small": {"weight": 9}},
            cleaning={"length": {"minimum_characters": 50}},
            output=str(tmp_path / "other"),
        )


def test_a_source_without_a_weight_that_gives_nothing_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_jsonl(tmp_path / "large.jsonl", [document(seed) for seed in range(40)])
    write_jsonl(tmp_path / "small.jsonl", ["short"])
    output = prepared(tmp_path, {"large": {}, "small": {}})
    assert "source small: 1 documents read, 1 kept; NOTHING of it is in training" in said_at_the_end(output)[1]
    _say_the_mixture(read_manifest(output))
    assert "source small gives no training sample" in caplog.text


def test_skipped_records_are_counted_against_the_source(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "text.jsonl", [document(seed) for seed in range(40)])
    with path.open("a") as file:
        file.write('{"text": "cut\n' * 400)
    with pytest.raises(DataPrepError, match=r"^source text: bad_json removes 400 of 440 documents \(90\.9%\)"):
        prepared(tmp_path, {"text": {"bad_documents": "skip"}})
    output = prepared(tmp_path, {"text": {"bad_documents": "skip", "most_removed": 0.95}})
    assert "440 documents read, 40 kept; removed bad_json 400 (90.9%); 100.0% of" in said_at_the_end(output)[0]


def test_a_tokenizer_that_does_not_know_the_text_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "text.jsonl", [document(seed) for seed in range(40)])
    known = {"<unk>": 0, "<|endoftext|>": 1, "<|pad|>": 2, "ship": 3}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    given = {"path": str(tmp_path / "tokenizer.json")}
    with pytest.raises(
        DataPrepError, match=r"^source text: [\d,]+ of [\d,]+ tokens \(9\d\.\d%\) are the tokenizer's tok"
    ):
        prepared(tmp_path, {"text": {}}, tokenizer=given)
    output = prepared(tmp_path, {"text": {}}, tokenizer=given, most_removed=0.95)
    assert "tokens the tokenizer does not know" in said_at_the_end(output)[0]


def test_a_source_seen_again_and_again_is_named_before_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_jsonl(tmp_path / "large.jsonl", [document(seed) for seed in range(200)])
    write_jsonl(tmp_path / "small.jsonl", [document(seed) for seed in range(500, 504)])
    output = prepared(tmp_path, {"large": {"weight": 1}, "small": {"weight": 9}})
    small = next(line for line in said_at_the_end(output) if line.startswith("source small"))
    assert "; 90.0% of the training samples, each sequence 4" in small and small.endswith(" times an epoch")
    _say_the_mixture(read_manifest(output))
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1 and warned[0].startswith("source small (weight 9): 90.0% of the samples, each 4")
    assert json.loads((output / "report.json").read_text())["sources"]["small"]["unknown_tokens"] == 0


def test_a_url_field_that_no_document_has_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "text.jsonl", [document(seed) for seed in range(40)])
    source: dict[str, object] = {"url_field": "url", "bad_documents": "skip"}
    with pytest.raises(DataPrepError, match=r"^source text: none of its 40 documents has a URL in 'url'; set url_"):
        prepared(tmp_path, {"text": source}, cleaning={"urls": {"blocked_words": ["bad"]}})
    with path.open("a") as file:
        file.write(json.dumps({"text": document(99), "url": "http://a.org/bad/"}) + "\n")
    output = prepared(tmp_path, {"text": source}, cleaning={"urls": {"blocked_words": ["bad"]}})
    assert "41 documents read, 40 kept; removed urls/blocked_word 1" in said_at_the_end(output)[0]


def test_a_damaged_file_is_named_at_the_end(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "text.jsonl", [document(seed) for seed in range(40)])
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress((tmp_path / "text.jsonl").read_bytes())[:-9])
    output = prepared(tmp_path, {"text": {"bad_documents": "skip", "inputs": [str(cut), str(tmp_path / "text.jsonl")]}})
    assert said_at_the_end(output)[1].startswith(
        f"source text: damaged: {cut}: not a whole gzip file (it ends too early)"
    )
