"""What near-duplicate matching removes of sources whose documents resemble one another: copies, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cola_megatron.config import resolve_tree
from cola_megatron.data import read_manifest
from data_prep import plan
from data_prep.errors import DataPrepError
from data_prep.prepare import prepare
from data_prep.recipe import Recipe
from tools.near_duplicates import chain, documents_of_a_template, number_tables, sheets_of_sums

pytest.importorskip("datatrove", reason="the extra `prep` is not installed")


def recipe_of(folder: Path, texts_of: dict[str, list[str]], near: dict[str, object], **changes: object) -> Recipe:
    tree: dict[str, object] = {
        "output": str(folder / "out"),
        "sources": [],
        "deduplication": {"near": near},
        "tokenizer": {"vocab_size": 300},
        "packing": {"sequence_length": 32},
    }
    for name, texts in texts_of.items():
        path = folder / f"{name}.jsonl"
        if not path.exists():  # a file that is written again is another one
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        tree["sources"].append({"name": name, "inputs": [str(path)]})
    return resolve_tree(Recipe, tree | changes)


def report_of(folder: Path, texts_of: dict[str, list[str]], near: dict[str, object], **changes: object) -> dict:
    recipe = recipe_of(folder, texts_of, near, **changes)
    return json.loads((prepare(recipe, progress=False) / "report.json").read_text())["sources"]


@pytest.mark.parametrize(
    ("texts", "least"),
    [
        pytest.param(sheets_of_sums(300), 300, id="sums"),
        pytest.param(number_tables(200), 200, id="tables"),
        pytest.param(documents_of_a_template(200), 200, id="template"),
        pytest.param(chain(200), 30, id="chain"),
    ],
)
def test_documents_that_differ_stay(tmp_path: Path, texts: list[str], least: int) -> None:
    report = report_of(tmp_path, {"text": texts}, {}, most_removed=1)
    assert report["text"]["kept"]["documents"] >= least


def test_copies_of_documents_of_a_template_go(tmp_path: Path) -> None:
    originals = documents_of_a_template(150)
    copies = [text.replace(" ", "  ").upper() + " indeed" for text in originals]
    report = report_of(tmp_path, {"text": originals + copies}, {})
    assert report["text"]["kept"]["documents"] == 150


def test_of_a_chain_each_copy_resembles_a_document_that_stays(tmp_path: Path) -> None:
    texts = chain(60)
    report = report_of(tmp_path, {"text": texts}, {"similarity": 0.5}, most_removed=1)
    # Windows that are 10 steps apart share 130 of 270 words: a document stays about every tenth step.
    assert 6 <= report["text"]["kept"]["documents"] <= 12


def test_numbers_are_alike_where_a_recipe_says_so(tmp_path: Path) -> None:
    sheets = sheets_of_sums(20)
    report = report_of(tmp_path, {"sums": sheets, "text": chain(1)}, {"numbers_alike": True}, most_removed=1)
    assert report["sums"]["removed"] == {"duplicate/near": 19}


def test_a_rule_that_removes_most_of_a_source_stops_the_run(tmp_path: Path) -> None:
    sources = {"text": documents_of_a_template(30), "chain": chain(60)}
    stopped = r"^source chain: duplicate/near removes \d+ of 60 documents \(\d\d\.\d%\), most_removed allows 50\.0%; "
    with pytest.raises(DataPrepError, match=stopped):
        report_of(tmp_path, sources, {})
    work = tmp_path / "out.work" / "clean" / "00000"
    before = work.stat().st_mtime_ns
    with pytest.raises(DataPrepError, match=stopped):
        report_of(tmp_path, sources, {})
    assert work.stat().st_mtime_ns == before, "what is finished stays"
    assert report_of(tmp_path, sources, {}, most_removed=0.9)["text"]["kept"]["documents"] == 30


def test_what_is_removed_does_not_depend_on_the_number_of_tasks(tmp_path: Path, monkeypatch) -> None:
    sources = {"chain": chain(60), "template": documents_of_a_template(80), "again": documents_of_a_template(40)}
    folders = tmp_path / "one", tmp_path / "four"
    reports = []
    for folder, size in zip(folders, (2**36, 2**15), strict=True):
        folder.mkdir()
        for name, texts in sources.items():
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            (folder / f"{name}.jsonl").hardlink_to(tmp_path / f"{name}.jsonl")
        monkeypatch.setattr(plan, "BYTES_OF_A_SHARE", size)
        reports.append(report_of(folder, sources, {}, most_removed=1, task_bytes=2**14))
    assert plan.make_plan(recipe_of(folders[1], sources, {}, task_bytes=2**14)).shares >= 4
    for report in reports:
        for source in report.values():
            source["examples"] = {rule: len(found) for rule, found in source["examples"].items()}
    assert reports[0] == reports[1]
    assert reports[0]["chain"]["removed"]["duplicate/near"] > 20
    assert reports[0]["again"]["removed"]["duplicate/exact"] == 40
    one, four = (read_manifest(folder / "out").files for folder in folders)
    assert {**one, "report.json": None} == {**four, "report.json": None}


def test_rules_of_a_source_are_its_own(tmp_path: Path) -> None:
    path = tmp_path / "chain.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*chain(60), "short", "short"]))
    sources = [
        {"name": "kept", "inputs": [str(path)], "cleaning": {}, "deduplication": "none"},
        {"name": "exact", "inputs": [str(tmp_path / "copy.jsonl")], "deduplication": "exact"},
    ]
    (tmp_path / "copy.jsonl").write_bytes(path.read_bytes())
    cleaning = {"length": {"minimum_characters": 10}}
    report = report_of(tmp_path, {}, {}, sources=sources, cleaning=cleaning)
    assert report["kept"]["removed"] == {}
    assert report["exact"]["removed"] == {"length/short": 2}
