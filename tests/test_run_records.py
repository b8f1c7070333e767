"""The records of a run: whole or not at all, strict JSON, and what is damaged in them ends no start."""

import errno
import json
import math
import os
import re
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from cola_megatron.data import ShardError
from cola_megatron.data.cache import ShardCache
from cola_megatron.errors import UserError
from cola_megatron.records.goodput import read_attempts
from cola_megatron.records.json_files import read_object, to_json, write_json
from cola_megatron.records.metrics import MetricsLog, read_metrics
from cola_megatron.records.run_folder import Summary, write_summary
from cola_megatron.training.loop import train
from launchers.output import print_json, print_table
from launchers.slurm.queue import Queue
from launchers.slurm.runs import state_of
from launchers.train_command import print_summary
from tests.commands import cola
from tests.test_training import curve

STEPS = ["training.steps=4", "training.evaluation.every=2"]


def strict(text: str) -> object:
    """As a reader of another language: NaN is no JSON."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize(
    ("name", "content"),
    [("summary.json", ""), ("progress.json", ""), *(("manifest.json", content) for content in ("", '{"git', "[]"))],
)
def test_a_damaged_file_that_only_informs_does_not_block_a_resume(tiny, caplog, name, content):
    config = tiny(1, *STEPS)
    train(tiny(1, *STEPS, "training.stop_after=2"), progress=False)
    (config.run_folder / name).write_text(content)
    assert train(config, progress=False).finished
    assert read_object(config.run_folder / name)
    assert (config.run_folder / f"damaged_{name}").read_text() == content
    assert caplog.text.count(f"{name} cannot be read: moved aside as damaged_{name}") == 1


@pytest.mark.parametrize("content", ["", '{"step": 4}'])
def test_the_summary_of_a_finished_run_is_written_again_where_it_is_damaged(tiny, content):
    config = tiny(1, *STEPS)
    first = train(config, progress=False)
    (config.run_folder / "summary.json").write_text(content)
    again = train(config, progress=False)
    assert (again.finished, again.step, again.metrics) == (True, 4, first.metrics)
    assert read_object(config.run_folder / "summary.json")["finished"]


def test_a_torn_line_in_the_metrics_is_moved_aside_and_the_others_stay(tiny, caplog):
    config = tiny(1, *STEPS)
    train(tiny(1, *STEPS, "training.stop_after=2"), progress=False)
    path = config.run_folder / "metrics.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    torn = f"{first[:20]}\n"
    path.write_text("".join([first, torn, *rest]) + '{"kind": "tra')
    assert train(config, progress=False).finished
    assert len(curve(config)) == 4
    assert (config.run_folder / "damaged_metrics.jsonl").read_text() == torn
    assert "1 lines cannot be read" in caplog.text


def test_half_a_last_line_in_the_attempts_does_not_spoil_the_next(tiny):
    config = tiny(1, *STEPS)
    for stop in (1, 2):
        train(tiny(1, *STEPS, f"training.stop_after={stop}"), progress=False)
        with (config.run_folder / "attempts.jsonl").open("a") as file:
            file.write('{"began": 17')
    assert train(config, progress=False).restarts == 2
    for line in (config.run_folder / "attempts.jsonl").read_text().splitlines():
        strict(line)
    assert len(read_attempts(config.run_folder)) == 3


def test_damaged_roll_backs_are_refused_because_they_decide_what_is_read(tiny):
    config = tiny(1, "training.steps=1")
    config.run_folder.mkdir(parents=True)
    (config.run_folder / "roll_backs.json").write_text("")
    with pytest.raises(UserError, match=r"roll_backs\.json cannot be read .* delete it to train on all of them"):
        train(config, progress=False)


def test_status_shows_all_runs_when_the_summary_of_one_is_empty(tiny, tmp_path):
    for name in ("first", "second"):
        train(tiny(1, f"name={name}", "training.steps=1"), progress=False)
    (tmp_path / "runs" / "first" / "summary.json").write_text("")
    shown = cola("status", tmp_path / "runs", "--json")
    assert shown.returncode == 0 and len(json.loads(shown.stdout)) == 2, shown.stderr


def test_status_and_sync_refuse_a_folder_that_does_not_exist(tmp_path):
    for command in ("status", "sync"):
        refused = cola(command, tmp_path / "nosuch")
        assert refused.returncode == 2 and "nosuch: no such folder" in refused.stderr
        assert cola(command, tmp_path).returncode == 0


def test_status_shows_the_time_left_of_a_run_without_a_job(tmp_path):
    run = tmp_path / "local"
    run.mkdir()
    for silent, left in ((0, 180.0), (600, None)):
        progress = {"step": 10, "steps": 100, "seconds_per_step": 2.0, "state": "training", "host": "here"}
        write_json(run / "progress.json", {**progress, "time": time.time() - silent})
        found = state_of(run, Queue())
        assert (found.state, found.seconds_left) == ("local", left)


def test_a_number_that_is_not_finite_is_null_in_files_and_answers(tiny, tmp_path):
    config = tiny(1)
    config.run_folder.mkdir(parents=True)
    log = MetricsLog(config, 0)
    log.write("train", 1, {"loss": math.nan, "gradient_norm": math.inf, "seconds": 1.0})
    log.close()
    (line,) = (config.run_folder / "metrics.jsonl").read_text().splitlines()
    assert strict(line) == {"kind": "train", "step": 1, "loss": None, "gradient_norm": None, "seconds": 1.0}
    (record,) = read_metrics(config.run_folder / "metrics.jsonl")
    assert math.isnan(record["loss"]) and record["seconds"] == 1.0
    summary = Summary(str(config.run_folder), 1, True, 1, 1.0, 1.0, {"loss": math.nan})
    write_summary(summary)
    assert strict((config.run_folder / "summary.json").read_text())["metrics"] == {"loss": None}
    assert strict(to_json([asdict(summary)]))[0]["metrics"] == {"loss": None}


def test_a_summary_names_the_step_of_its_measurement(tiny, capsys):
    summary = train(tiny(1, *STEPS, "training.stop_after=3"), progress=False)
    assert (summary.step, summary.measured_at) == (3, 2)
    print_summary(summary)
    assert re.search(r"measured at step +2\n", capsys.readouterr().out)
    print_summary(train(tiny(1, *STEPS), progress=False))
    assert "measured at step" not in capsys.readouterr().out


def test_of_the_processes_of_a_command_one_gives_the_answer(capsys, monkeypatch):
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        print_json({"answer": 42})
        print_table([("answer", "42")])
    assert capsys.readouterr().out.count("42") == 2


def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)


def test_a_run_on_a_file_system_without_locks_is_warned_and_goes_on(tiny, monkeypatch, caplog):
    no_locks(monkeypatch)
    config = tiny(1, "training.steps=1")
    assert train(config, progress=False).finished
    assert f"{config.run_folder}: this file system has no locks (No locks available)" in caplog.text
    assert "give a runs_folder= elsewhere" in caplog.text


def test_a_cache_on_a_file_system_without_locks_is_refused_with_its_path(tmp_path: Path, monkeypatch):
    no_locks(monkeypatch)
    with pytest.raises(ShardError, match=rf"{tmp_path}.*has no locks.*give a data\.cache_folder on a disk of the node"):
        ShardCache(tmp_path / "cache", 10**6).path("0" * 64, 10, lambda file: None)


def test_a_document_is_written_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "document.json"
    write_json(path, {"step": 1})
    with pytest.raises(TypeError):
        write_json(path, {"step": object()})
    assert read_object(path) == {"step": 1}


def test_records_are_on_the_disk_before_what_counts_on_them(tiny, monkeypatch):
    """A power cut leaves of a file what was flushed, and of a rename that of its folder."""
    flushed: dict[int, int] = {}
    real = os.fsync

    def noted(descriptor: int) -> None:
        real(descriptor)
        found = os.fstat(descriptor)
        flushed[found.st_ino] = found.st_size

    monkeypatch.setattr(os, "fsync", noted)
    config = tiny(1, *STEPS)
    train(config, progress=False)
    run = config.run_folder
    for name in ("config.yaml", "manifest.json", "summary.json"):
        status = (run / name).stat()
        assert flushed[status.st_ino] == status.st_size > 0, name
    assert {run.stat().st_ino, run.parent.stat().st_ino} <= flushed.keys()
    metrics = run / "metrics.jsonl"
    assert b'"step": 4' in metrics.read_bytes()[: flushed[metrics.stat().st_ino]], "the last checkpoint is of step 4"
    assert (run / "progress.json").stat().st_ino not in flushed, "written every second"
