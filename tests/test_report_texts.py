"""Texts on a run's page: reconstructions beside their originals, and what the run wrote at its measurements."""

import json
from pathlib import Path

import pytest

from cola_megatron.records.texts import TEXTS, readable_texts
from cola_megatron.reporting.continuations import Sampling
from cola_megatron.reporting.observed import Observed, observe
from cola_megatron.reporting.page import write_report
from cola_megatron.reporting.report import ReconstructedText, TextOverSteps, Written
from cola_megatron.reporting.run_page import report_of_run
from cola_megatron.reporting.run_records import read_run
from cola_megatron.reporting.text_records import SHOWN, texts_over_steps
from cola_megatron.training.loop import train
from tests.test_report import Page, report_of

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch):
    """Rendering takes most of the time; tests/test_report.py does it."""
    monkeypatch.setattr("cola_megatron.reporting.pictures.png_of", lambda figure, dots: b"")


def continuations(step: int, *texts: str) -> dict:
    strip = [{"t": 1.0, "text": f"noise {step}"}, {"t": 0.0, "text": f"data {step}"}]
    return {
        "kind": "continuations",
        "step": step,
        "texts": [
            {"prompt": f"prompt {place}", "continuation": text, "truth": "truth", "strip": strip}
            for place, text in enumerate(texts)
        ],
    }


def marked_on(page: Page) -> int:
    return sum(tag == "mark" for tag, _ in page.tags)


def test_wrong_tokens_are_marked_and_hostile_text_is_shown_and_not_obeyed(tmp_path: Path):
    hostile = "</mark><script>alert(1)</script> \x00"
    found = Written(9_000, [("right ", True), (hostile, False)], wrong=3, tokens=40)
    text = ReconstructedText([("right ", True), ("other", False)], found)
    page = Page(write_report(tmp_path, report_of(reconstructed=[text], texts=[])))
    assert marked_on(page) == 2
    assert "script" not in {tag for tag, _ in page.tags}
    assert "right </mark><script>alert(1)</script> \u2400" in page.text
    assert "3 of 40 tokens wrong" in page.text
    over_steps = TextOverSteps(None, [("right other", True)], [found])
    page = Page(write_report(tmp_path, report_of(reconstructed=[], texts=[over_steps])))
    assert marked_on(page) == 1 and "step 9,000" in page.text and "Reconstructed texts" not in page.text


def test_the_page_shows_each_text_and_its_strip_at_some_steps(tmp_path: Path):
    records = [continuations(step, *(["one", "two"] if step > 50 else ["one"])) for step in range(10, 210, 10)]
    texts = texts_over_steps(records)
    assert [[written.step for written in text.written] for text in texts] == [
        [10, 50, 90, 120, 160, 200],
        [90, 120, 160, 200],  # the number of texts was raised in between
    ]
    assert len(texts[0].written) == SHOWN
    page = Page(write_report(tmp_path, report_of(texts=texts)))
    for shown in ("prompt 0", "prompt 1", "truth", "step 200", "t = 1", "t = 0", "noise 10", "data 200"):
        assert shown in page.text
    assert texts_over_steps([]) == []


def test_a_page_of_stage_one_has_what_its_checkpoint_makes_of_texts(tiny, tmp_path: Path):
    config = tiny(1, "training.evaluation.texts=2", "training.evaluation.every=3")
    train(config, progress=False)
    records, _ = readable_texts(config.run_folder)
    run = read_run(config.run_folder)
    observed = observe(run, None, None, tmp_path / "samples.json", Sampling(samples=2))
    # The checkpoint of the last step writes what the run itself wrote then.
    assert [text.found.pieces for text in observed.reconstructed] == [
        [tuple(piece) for piece in text["reconstruction"]] for text in records[-1]["texts"]
    ]
    page = Page(write_report(tmp_path, report_of_run(run, observed)))
    assert "Reconstructed texts" in page.text and "Texts over the steps of training" in page.text
    assert marked_on(page) > 0


def test_damaged_lines_are_named_and_the_rest_is_shown(tiny):
    config = tiny(2, "training.evaluation.texts=1", "training.steps=2")
    train(config, progress=False)
    with (config.run_folder / TEXTS).open("a") as file:
        file.write("{damaged\n" + json.dumps({"kind": "continuations", "step": 9, "texts": ["?"]}) + "\n")
    report = report_of_run(read_run(config.run_folder), Observed(samples_absent="--curves-only"))
    assert any(TEXTS in note and "2 in all: 2, 3" in note for note in report.notes)
    assert [written.step for written in report.texts[0].written] == [2]


def test_runs_without_texts_have_no_such_part(tiny):
    config = tiny(2, "training.steps=1")
    train(config, progress=False)
    report = report_of_run(read_run(config.run_folder), Observed(samples_absent="--curves-only"))
    assert report.texts == [] and report.reconstructed == []
    assert not any(TEXTS in note for note in report.notes)
