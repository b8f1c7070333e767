"""The accounts of a run that was started several times."""

import json
import os
import time
from pathlib import Path

import pytest

from cola_megatron.records.goodput import accounts_of, begin_attempt, read_attempts
from cola_megatron.records.metrics import read_metrics
from cola_megatron.records.progress import read_progress
from cola_megatron.training.loop import train


def attempt(began: float, alive_until: float | None = None, lost: int = 0) -> dict:
    return {"began": began, "previous_alive_until": alive_until, "lost_steps": lost}


def test_machines_are_held_from_each_beginning_to_the_last_sign_of_life() -> None:
    accounts = accounts_of([attempt(100), attempt(500, 160, 7), attempt(900, 540, 2)])
    assert (accounts.restarts, accounts.lost_steps, accounts.held_before) == (2, 9, 60 + 40)
    metrics = accounts_of([attempt(time.time() - 100)]).metrics(50)
    assert metrics["goodput"] == pytest.approx(0.5, abs=0.01) and metrics["restarts"] == 0
    assert accounts_of([attempt(0), attempt(time.time(), None)]).held_before == 0, "no sign of life before the end"


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    begin_attempt(tmp_path, 0, 1)
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write('{"began": 12')
    assert len(read_attempts(tmp_path)) == 1


def test_a_resumed_run_knows_what_it_lost(tiny) -> None:
    config = tiny(1, "training.checkpoint.every=2", "training.stop_after=4")
    train(config, progress=False)
    (first,) = read_attempts(config.run_folder)
    assert (first["from_step"], first["lost_steps"], first["processes"]) == (0, 0, 1)
    shown = read_progress(config.run_folder)
    assert (shown["step"], shown["steps"], shown["state"]) == (4, 6, "stopped")
    assert shown["loss"] > 0 and shown["tokens_per_second"] > 0
    # As if it had been killed in step 5: the newest checkpoint is gone, too.
    (config.run_folder / "checkpoints" / "step_00000004").rename(config.run_folder / "gone")
    summary = train(tiny(1, "training.checkpoint.every=2"), progress=False)
    assert (summary.restarts, summary.lost_steps) == (1, 2) and 0 < summary.goodput <= 1
    last = [record for record in read_metrics(config.run_folder / "metrics.jsonl") if record["kind"] == "train"][-1]
    assert (last["restarts"], last["lost_steps"]) == (1, 2)
    assert read_progress(config.run_folder)["state"] == "finished"
    assert json.loads((config.run_folder / "summary.json").read_text())["lost_steps"] == 2


def test_the_supervisor_says_when_a_try_began(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "COLA_ATTEMPT_BEGAN", str(time.time() - 1000))
    monkeypatch.setitem(os.environ, "SLURM_JOB_ID", "4711")
    summary = train(tiny(1, "training.steps=2"), progress=False)
    assert 0 < summary.goodput < 0.1
    assert read_progress(Path(summary.run_folder))["job"] == "4711"
