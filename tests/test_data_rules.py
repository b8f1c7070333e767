"""Cleaning, deduplication and decontamination inside a whole preparation, and what `cola prep stats` says of it."""

import json
import random
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from launchers.cli import app

pytest.importorskip("datatrove", reason="needs the extra `prep`")

ITEM = {
    "id": 0,
    "prompt": "",
    "question": "Which river that rises in the black hills of the northern county flows past the old mill",
    "answer": "the Wend",
}


SYLLABLES = ["ba", "do", "fe", "gi", "ku", "la", "me", "no", "pu", "ri", "sa", "te"]


def text(number: int) -> str:
    """A paragraph that resembles no other (to near-duplicate matching all numbers are alike)."""
    chooser = random.Random(number)
    words = ("".join(chooser.choices(SYLLABLES, k=3)) for _ in range(80))
    return f"{' '.join(words)} and the end of it."


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    documents = [text(number) for number in range(60)]
    nearly = documents[3].replace("end", "close")
    planted = f"{text(200)} {ITEM['question']}? {text(201)}"
    for name, texts in (("first", documents), ("second", [documents[0], nearly, planted, "too short", text(300)])):
        lines = "".join(json.dumps({"text": each}) + "\n" for each in texts)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    (tmp_path / "sets").mkdir()
    rows = [{"text": f"{ITEM['question']} {ITEM['answer']}"}]
    (tmp_path / "sets" / "lambada.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "output": str(tmp_path / "out"),
        "sources": [{"name": name, "inputs": [str(tmp_path / f"{name}.jsonl")]} for name in ("first", "second")],
        "cleaning": {"length": {"minimum_characters": 50}},
        "deduplication": {"near": {}},
        "decontamination": {"folder": str(tmp_path / "sets"), "tasks": ["lambada"]},
        "tokenizer": {"vocab_size": 400},
        "packing": {"sequence_length": 64},
        "held_out_fraction": 0.1,
        "task_bytes": 20_000,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def prep(*arguments: object):
    return CliRunner().invoke(app, ["prep", *map(str, arguments)], env={"COLUMNS": "200"})


def test_planted_documents_are_found_and_the_others_stay(recipe: Path, tmp_path: Path) -> None:
    plan = prep("run", "--recipe", recipe, "--dry-run")
    assert plan.exit_code == 0 and "step cluster: 1 tasks" in plan.output and not (tmp_path / "out.work").exists()
    done = prep("run", "--recipe", recipe, "--workers", 1)
    assert done.exit_code == 0, done.output
    report = json.loads(prep("stats", tmp_path / "out", "--json").stdout)
    first, second = (report["sources"][name] for name in ("first", "second"))
    assert (first["kept"]["documents"], first["removed"]) == (60, {})
    assert second["kept"]["documents"] == 1
    assert second["removed"].pop("contamination") == 1
    assert second["removed"].pop("duplicate/exact") == 1
    assert second["removed"].pop("duplicate/near") == 1
    assert sum(second["removed"].values()) == 1  # the short one
    found = report["contamination"]["lambada"]
    assert (found["found"], found["documents"]) == (1, 1)
    assert "second.jsonl:3" in found["examples"][0]


def test_another_evaluation_set_is_another_preparation(recipe: Path, tmp_path: Path) -> None:
    assert prep("run", "--recipe", recipe, "--workers", 1).exit_code == 0
    assert prep("run", "--recipe", recipe, "--workers", 1).exit_code == 0
    with (tmp_path / "sets" / "lambada.jsonl").open("a") as file:
        file.write(json.dumps({"text": "a second question that the corpus has never met"}) + "\n")
    again = prep("run", "--recipe", recipe, "--workers", 1)
    assert again.exit_code != 0 and "was prepared differently" in str(again.exception) + again.output


def test_statistics_are_tables_and_pictures(recipe: Path, tmp_path: Path) -> None:
    assert prep("run", "--recipe", recipe, "--workers", 1).exit_code == 0
    shown = prep("stats", tmp_path / "out", "--figures", tmp_path / "figures")
    assert shown.exit_code == 0, shown.output
    for wanted in ("duplicate/near", "train/first", "lambada", "documents read"):
        assert wanted in shown.output
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"lengths.png", "removed.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "figures").iterdir())


def test_removed_documents_can_be_looked_at(recipe: Path, tmp_path: Path) -> None:
    assert prep("run", "--recipe", recipe, "--workers", 1).exit_code == 0
    shown = prep("inspect", tmp_path / "out").output
    assert "source first: nothing was removed" in shown
    assert "source second: length/short removed 1 documents, for example\n" in shown
    assert f"  {tmp_path}/second.jsonl:4: 9 characters\n    too short\n" in shown
    found = json.loads(prep("inspect", tmp_path / "out", "--json", "--rule", "duplicate").stdout)["second"]
    assert {rule: [each["place"].rpartition(":")[2] for each in of["examples"]] for rule, of in found.items()} == {
        "duplicate/exact": ["1"],
        "duplicate/near": ["2"],
    }
    assert "contamination removed 1" in prep("inspect", tmp_path / "out", "--rule", "contamination").output


def test_documents_can_be_looked_at_where_a_rule_removed_most(recipe: Path, tmp_path: Path) -> None:
    refused = prep("run", "--recipe", recipe, "--workers", 1, "cleaning.length.minimum_characters=5000")
    work = tmp_path / "out.work"
    assert f"(the first: {tmp_path}/first.jsonl:1: " in str(refused.exception)
    assert f"`cola prep inspect {work}`" in str(refused.exception)
    shown = prep("inspect", work).output
    assert "source first: length/short removed 60 documents" in shown and shown.count("/first.jsonl:") == 6
    assert text(0)[:100] in shown
