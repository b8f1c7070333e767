"""An axis over the items of a measurement: the rows that it makes, what they count, published numbers beside them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cola_megatron.config import ConfigError, dump_config
from cola_megatron.records.json_files import write_json
from cola_megatron.studies.collect import collect
from cola_megatron.studies.folder import StudyFolder
from cola_megatron.studies.report.axis_cells import compare_axes
from cola_megatron.studies.report.tables import published_table
from cola_megatron.studies.results import read_results
from cola_megatron.studies.study_file import load_study
from cola_megatron.studies.words import flops
from launchers.sweep_files import study_file
from launchers.sweep_jobs import jobs_of

AXES = {
    "rate": {"settings": {"1": {"training.optimizer.learning_rate": 1e-3}, "2": {}}},
    "prompt": {
        "varies": "items",
        "arms": ["parts"],
        "settings": {"odd": {"prompt_length": "odd"}, "even": {"prompt_length": "even"}},
    },
}


def begun(folder: Path, **over: Any) -> StudyFolder:
    """One arm as a whole and once more by parts of its items."""
    tree = {
        "name": "parts",
        "arms": {"whole": {"config": "tiny-autoregressive"}, "parts": {"config": "tiny-autoregressive"}},
        "axes": AXES,
        "overrides": {"training.schedule.warmup_steps": 2},
        "budgets": {"column": "steps", "amounts": [20]},
        "seeds": [1],
        "data": {"path": "data"},
        "measures": {"likelihood_texts": 2, "last_word_items": 4, "tasks": ["lambada"], "benchmarks": "items"},
        "fit": {"score": "last_word"},
        **over,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return StudyFolder.begin(folder / "out", load_study(path))


def records(correct: list[int], lengths: list[int | None]) -> list[dict[str, Any]]:
    found = []
    for number, (right, length) in enumerate(zip(correct, lengths, strict=True)):
        record = {"id": number, "sequence": number, "correct": bool(right), "guesses": {"bigram": {"correct": True}}}
        found.append(record if length is None else {**record, "prompt_tokens": length})
    return found


def measure(opened: StudyFolder, correct: list[int], lengths: list[int | None]) -> None:
    """Every run as finished, and measured so."""
    for point in opened.expanded.measured_once():
        run = opened.expanded.runs[point.run]
        opened.prepare(run)
        (opened.run_folder(run.name) / "config.yaml").write_text(dump_config(run.config))
        write_json(opened.run_folder(run.name) / "summary.json", {"finished": True})
        folder = opened.measurements_of(point)
        (folder / "tasks").mkdir(parents=True)
        exact = {"value": 4.5, "standard_error": 0.1, "draw_error": None, "kind": "exact"}
        write_json(folder / "likelihood.json", {"texts": 2, "nats_per_token": exact})
        items = records(correct, lengths)
        figure = {"value": sum(correct) / len(correct), "standard_error": 0.1}
        counted = {"accuracy": figure, "baselines": {"bigram": {"value": 1.0, "standard_error": 0.1}}}
        write_json(folder / "last_word.json", {"n": len(items), **counted, "items": items})
        task = {"task": "lambada", "model": "m", "settings": {}, "items": items}
        write_json(folder / "tasks" / "lambada.json", task)


def test_parts_of_the_items_share_the_run_and_its_measurement(tmp_path):
    opened = begun(tmp_path)
    assert set(opened.expanded.runs) == {"whole-rate1-20-s1", "whole-rate2-20-s1"}
    assert [point.name for point in opened.expanded.points] == [
        *("whole-rate1-20-s1", "whole-rate2-20-s1", "parts-rate1-promptodd-20-s1", "parts-rate1-prompteven-20-s1"),
        *("parts-rate2-promptodd-20-s1", "parts-rate2-prompteven-20-s1"),
    ]
    assert sum(job.kind == "measure" for job in jobs_of(opened).values()) == 2


def test_scores_are_of_the_chosen_items_and_a_likelihood_has_none(tmp_path):
    opened = begun(tmp_path)
    measure(opened, [1, 0, 1, 1, 0], [4, 3, 2, 7, 5])
    rows = {row["point"]: row for row in collect(opened)["rows"]}
    assert {row["state"] for row in rows.values()} == {"finished"}
    whole, odd, even = (
        rows[f"{name}-20-s1"]["measures"] for name in ("whole-rate1", "parts-rate1-promptodd", "parts-rate1-prompteven")
    )
    assert whole["last_word"]["value"] == whole["lambada"]["value"] == 0.6 and "nats_per_token" in whole
    for found, share, items in ((odd, 1 / 3, 3), (even, 1.0, 2)):
        assert found.keys() == {"last_word", "lambada", "task_average"}
        assert found["last_word"]["value"] == found["task_average"]["value"] == pytest.approx(share)
        assert found["last_word"]["items"] == found["lambada"]["items"] == items
        assert found["last_word"]["error"] > 0
    results = read_results(opened.folder)
    assert results.baselines("last_word") == {"bigram": 1.0}, "as counted on all items"
    comparison = compare_axes(results, "parts", "score")
    assert comparison is not None and len(comparison.cells) == 4
    assert compare_axes(results, "parts", "loss") is None


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([4, 2], "none of its 2 items has a prompt of odd length"), ([3, None], "does not say how long its prompts were")],
)
def test_a_part_that_cannot_be_told_is_named_and_takes_no_other_point_away(lengths, message, tmp_path):
    opened = begun(tmp_path)
    measure(opened, [1, 0], lengths)
    rows = {row["point"]: row for row in collect(opened)["rows"]}
    assert rows["whole-rate1-20-s1"]["state"] == "finished"
    odd = rows["parts-rate1-promptodd-20-s1"]
    assert odd["state"] == "damaged" and message in odd["error"] and "last_word.json" in odd["error"]


@pytest.mark.parametrize("keys", [{}, {"prompt_length": "long"}, {"steps": 4}, {"prompt_length": "odd", "steps": 4}])
def test_what_chooses_no_items_is_refused(keys, tmp_path):
    with pytest.raises(ConfigError, match=r"settings\.odd: items are chosen by prompt_length: odd or even"):
        begun(tmp_path, axes={**AXES, "prompt": {**AXES["prompt"], "settings": {"odd": keys}}})


def test_a_part_twice_is_refused(tmp_path):
    twice = {"odd": {"prompt_length": "odd"}, "again": {"prompt_length": "odd"}}
    with pytest.raises(ConfigError, match="two equal runs"):
        begun(tmp_path, axes={**AXES, "prompt": {**AXES["prompt"], "settings": twice}})


def test_published_numbers_whose_compute_nobody_said_stand_beside_our_largest(tmp_path):
    settings = {"rate": "1", "prompt": "odd"}
    published = [
        {"arm": "parts", "settings": settings, "score": 0.0026},
        {"arm": "parts", "compute": 1e9, "score": 0.2},
    ]
    opened = begun(tmp_path, published=published, budgets={"column": "steps", "amounts": [20, 40]})
    measure(opened, [1, 0, 1], [4, 3, 2])
    collect(opened)
    first, second = published_table(read_results(opened.folder)).rows
    assert first[:4] == ("parts, rate 1, prompt odd", "not said", "score", "0.00260")
    largest = max(row.compute["nominal"] for row in read_results(opened.folder).rows)
    assert first[4] == f"0 (last word) at {flops(largest)}"
    assert second[1] == "1e9 (nominal)"


def test_the_patches_of_rq3_are_split_by_the_length_of_prompts(tmp_path):
    for scale in (None, "tiny"):
        opened = StudyFolder(tmp_path, load_study(study_file("rq3"), scale))
        points = [point for point in opened.expanded.points if point.arm == "patch_by_prompt"]
        assert {point.items["prompt_length"] for point in points} == {"odd", "even"}
        assert {point.settings["patch"] for point in points} >= {"1", "2"}
        others = {(point.run, point.measured_as) for point in opened.expanded.points if point.arm == "patch"}
        assert {(point.run, point.measured_as) for point in points} == others, "nothing is trained or measured for it"
