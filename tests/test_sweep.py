"""`cola sweep` on one machine: what runs when, what a failure holds up, and that it goes on wherever it was killed."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from cola_megatron.errors import UserError
from cola_megatron.records.run_folder import lock_run_folder
from launchers.sweep_jobs import Job, with_needs
from launchers.sweep_machine import machine
from launchers.sweep_run import LocalScheduler, Machine, Outcome
from tests import commands

LONG = 400.0
"""Seconds for a study of a few processes that each import torch."""
SMALL = {
    "model.vocab_size": 300,
    "model.transformer.hidden_size": 32,
    "model.transformer.ffn_hidden_size": 64,
    "model.transformer.num_layers": 2,
    "data.sequence_length": 32,
    "training.global_batch_size": 8,
    "training.micro_batch_size": 4,
    "training.loader_workers": 0,
    "training.evaluation.samples": 8,
    "training.log.every": 1,
    "training.log.wandb": "disabled",
}


def study(folder: Path, corpus: Path, **over: object) -> Path:
    tree = {
        "name": "small",
        "arms": {"ar": {"config": "tiny-autoregressive"}},
        "overrides": SMALL,
        "budgets": {"column": "steps", "amounts": [4, 8], "runs": "branches", "decay_share": 0.5, "warmup_share": 0.25},
        "seeds": [1],
        "data": {"path": str(corpus)},
        "measures": {"likelihood_texts": 2},
        **over,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def table(folder: Path) -> list[dict]:
    """The rows, without what no two runs have in common."""
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return [{name: value for name, value in row.items() if name not in ("seconds", "device_hours")} for row in rows]


# ---- the scheduler, with jobs that take half a second ---------------------------------------------------------------


def job(folder: Path, name: str, *needs: str, words: str = "config tiny", memory: float = 1.0, **more: object) -> Job:
    """Done when its process has printed something."""
    log = folder / f"{name}.log"
    commands = [part.split() for part in words.split(" then ")]
    return Job(name, "train", lambda: commands, lambda: log.is_file(), log, needs, memory, **more)


def run(jobs: list[Job], at_once: int = 2, memory: float = 10.0) -> Outcome:
    return LocalScheduler({each.name: each for each in jobs}, Machine(at_once, memory)).run()


def test_a_job_waits_for_what_it_needs_and_a_failure_holds_up_no_other(tmp_path, capfd):
    jobs = [
        job(tmp_path, "first"),
        job(tmp_path, "bad", words="config nosuch"),
        job(tmp_path, "after", "first", words="config tiny then config tiny-plaid"),
        job(tmp_path, "never", "bad"),
    ]
    outcome = run(jobs)
    assert (outcome.done, outcome.waiting, outcome.stopped) == (["after", "first"], ["never"], False)
    assert list(outcome.failed) == ["bad"] and "nosuch: neither a config file nor" in outcome.failed["bad"]
    assert "family: plaid" in (tmp_path / "after.log").read_text(), "the second command ran in its turn"
    said = capfd.readouterr().err
    assert said.index("first: done") < said.index("after: done") and "bad: failed: cola: nosuch" in said


def test_what_is_done_is_not_begun_again(tmp_path):
    (tmp_path / "first.log").write_text("of an earlier process\n")
    outcome = run([job(tmp_path, "first"), job(tmp_path, "second", "first")])
    assert outcome.done == ["first", "second"]
    assert (tmp_path / "first.log").read_text() == "of an earlier process\n"


def test_memory_and_slots_bound_what_runs_at_once(tmp_path):
    jobs = [job(tmp_path, name, memory=4.0) for name in "abc"]
    most = 0

    class Watched(LocalScheduler):
        def _reap(self) -> None:
            nonlocal most
            most = max(most, len(self.running))
            super()._reap()

    outcome = Watched({each.name: each for each in jobs}, Machine(3, 9.0)).run()
    assert (most, outcome.done) == (2, ["a", "b", "c"])
    with pytest.raises(UserError, match=r"d needs about 18\.6 GiB, and 9\.3 GiB may be used"):
        run([job(tmp_path, "d", memory=2e10)], memory=1e10)


def test_a_run_that_another_process_trains_is_waited_for(tmp_path, capfd):
    taken = contextlib.ExitStack()
    taken.enter_context(lock_run_folder(tmp_path / "run"))
    waiting = job(tmp_path, "mine", run_folder=tmp_path / "run")

    class Releasing(LocalScheduler):
        rounds = 0

        def _reap(self) -> None:
            super()._reap()
            self.rounds += 1
            if self.rounds == 3:
                assert not self.running
                taken.close()

    assert Releasing({"mine": waiting}, Machine(1, 10.0)).run().done == ["mine"]
    assert capfd.readouterr().err.count("mine: another job trains there") == 1


def test_a_job_that_cannot_begin_has_failed_and_holds_up_no_other(tmp_path):
    (tmp_path / "taken").write_text("")
    bad = Job("bad", "train", lambda: [["config", "tiny"]], lambda: False, tmp_path / "taken" / "log", memory=1.0)
    outcome = run([bad, job(tmp_path, "good")])
    assert outcome.done == ["good"] and outcome.failed["bad"].startswith("could not begin: ")


def test_what_somebody_else_did_meanwhile_is_not_begun(tmp_path):
    measured = tmp_path / "likelihood.json"
    late = Job("measure", "measure", list, measured.is_file, tmp_path / "measure.log", ("first",), 1.0)
    first, after = job(tmp_path, "first"), job(tmp_path, "after", "measure")

    class Meanwhile(LocalScheduler):
        def _ended(self, *ended: object) -> None:
            measured.write_text("{}")
            super()._ended(*ended)

    jobs = {"first": first, "measure": late, "after": after}
    assert Meanwhile(jobs, Machine(1, 10.0)).run().done == ["after", "first", "measure"]


def test_runs_of_several_processes_have_gpus_of_their_own(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    assert (machine(None, 1.0).at_once, machine(None, 1.0).gpus) == (5, ("0", "1", "2", "3", "4"))
    assert (machine(None, 1.0, 2).at_once, machine(None, 1.0, 2).gpus) == (2, ("0,1", "2,3"))
    assert machine(6, 1.0, 4).gpus == ("0,1,2,3",), "six jobs share them"
    with pytest.raises(UserError, match="--processes 8: here are 5 GPUs"):
        machine(None, 1.0, 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine(None, 1.0, 10**6).at_once == 1


def test_a_run_is_taken_alone_with_what_it_needs_and_its_measurements(tmp_path):
    jobs = {each.name: each for each in (job(tmp_path, "vae"), job(tmp_path, "a", "vae"), job(tmp_path, "b", "vae"))}
    jobs["measure-a"] = Job("measure-a", "measure", list, lambda: False, tmp_path / "m.log", ("a",))
    assert list(with_needs(jobs, ["a"])) == ["vae", "a", "measure-a"]
    with pytest.raises(UserError, match="c: the study has no such run; it has vae, a, b"):
        with_needs(jobs, ["c"])


# ---- whole studies --------------------------------------------------------------------------------------------------


def test_a_study_from_its_file_to_its_table(tmp_path, corpus):
    budgets = {"column": "steps", "amounts": [4], "warmup_share": 0.25}
    path, out = study(tmp_path, corpus, budgets=budgets), tmp_path / "out"
    done = commands.cola("sweep", "run", path, "--output", out, timeout=LONG)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 points are complete" in done.stdout
    (row,) = rows = table(out)
    assert (row["point"], row["state"], row["step"]) == ("ar-4-s1", "finished", 4)
    assert row["measures"]["nats_per_token"]["kind"] == "exact"
    assert (row["devices"], row["device"], row["trunk"]) == (1, "cpu", None)
    again = commands.cola("sweep", "run", path, "--output", out)
    assert again.returncode == 0 and "2 jobs, 2 done before" in again.stderr
    assert table(out) == rows
    shown = json.loads(commands.cola("sweep", "status", out, "--json").stdout)
    assert {row["state"] for row in shown} == {"finished"} and len(shown) == 2


def test_a_second_scheduler_is_refused_before_it_writes(tmp_path, corpus):
    path, out = study(tmp_path, corpus), tmp_path / "out"
    with lock_run_folder(out):
        refused = commands.cola("sweep", "run", path, "--output", out)
        assert refused.returncode == 1 and "another `cola sweep` runs this study here" in refused.stderr
        assert not (out / "index.json").exists()


@pytest.mark.slow
def test_a_failed_run_is_shown_with_its_last_error_and_rerun_alone(tmp_path, corpus):
    late, out = tmp_path / "late", tmp_path / "out"
    arms = {
        "ar": {"config": "tiny-autoregressive"},
        "lost": {"config": "tiny-autoregressive", "overrides": {"training.start_from": str(late)}},
    }
    path = study(tmp_path, corpus, arms=arms, budgets={"column": "steps", "amounts": [4], "warmup_share": 0.25})
    failed = commands.cola("sweep", "run", path, "--output", out, "--at-once", 2, timeout=LONG)
    assert failed.returncode == 1
    assert f"lost-4-s1 failed: cola: {late}" in failed.stdout and "--only lost-4-s1` tries it again" in failed.stdout
    states = {row["name"]: row for row in json.loads(commands.cola("sweep", "status", out, "--json").stdout)}
    assert str(late) in states["lost-4-s1"]["note"]
    assert [row["state"] for row in table(out)] == ["finished", "failed"]
    donor = commands.cola(
        *("train", out / "runs" / "ar-4-s1" / "requested.yaml", "name=donor", f"runs_folder={tmp_path}"),
        *("training.steps=2", "training.schedule.decay_steps=4"),
    )
    assert donor.returncode == 0, donor.stderr
    late.symlink_to(tmp_path / "donor")
    cured = commands.cola("sweep", "resume", out, "--only", "lost-4-s1", timeout=LONG)
    assert cured.returncode == 0, cured.stderr
    assert "2 jobs, 0 done before" in cured.stderr
    assert [row["state"] for row in table(out)] == ["finished", "finished"]


def start(path: Path, out: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "cola_megatron", "sweep", "run", path, "--output", out, "--at-once", "1"]
    return subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_anywhere_it_goes_on_to_the_same_table(number, tmp_path, corpus):
    path = study(tmp_path, corpus)
    whole = commands.cola("sweep", "run", path, "--output", tmp_path / "whole", timeout=LONG)
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "out"
    stages = (
        out / "runs" / "ar-trunk-s1" / "metrics.jsonl",  # in the middle of the trunk
        out / "runs" / "ar-8-s1" / "log.txt",  # while a branch begins
        out / "runs" / "ar-8-s1" / "measurements",  # while it is measured
    )
    for file in stages:
        process = start(path, out)
        wait_until(functools.partial(_is_there_or_ended, file, process))
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        os.kill(process.pid, number)
        assert process.wait(120) == (75 if number == signal.SIGTERM else -signal.SIGKILL)
        _, alive = psutil.wait_procs(children, 60)
        assert not alive, "no run outlives its study"
    finished = commands.cola("sweep", "resume", out, timeout=LONG)
    assert finished.returncode == 0, finished.stderr
    assert table(out) == table(tmp_path / "whole")


def _is_there_or_ended(file: Path, process: subprocess.Popen[bytes]) -> bool:
    return file.exists() or process.poll() is not None
