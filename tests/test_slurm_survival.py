"""Training jobs on a real Slurm: what ends them, and that nothing is lost by it."""

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cola_megatron.checkpoint.find import newest_checkpoint
from cola_megatron.config import RunConfig, dump_config, load_config
from cola_megatron.records.metrics import read_metrics
from cola_megatron.training.loop import train
from tests.commands import cola
from tests.ranks import run_ranks
from tests.slurm_cluster import TERMINAL, Cluster, records
from tests.support import TINY

STEPS = 60
# A step of this takes some 40 ms, so the run lasts long enough to be hit in the middle.
LONG = [
    f"training.steps={STEPS}",
    "training.checkpoint.every=10",
    "training.checkpoint.keep_last=3",
    "parallel.peer_timeout_seconds=30",
]
# Each start of a job takes some ten seconds here, so one way of starting must do for the tests of every day.
AGENT_SLOWLY, TASKS_SLOWLY = (pytest.param(launcher, marks=pytest.mark.slow) for launcher in ("agent", "tasks"))
SITE = """
partition: main
gpus_per_node: 0
exclusive: false
preflight: false
wait_seconds: 30
pause_seconds: 0.5
"""


class Job:
    """A submitted run."""

    def __init__(self, slurm: Cluster, config: RunConfig, answer: dict):
        self.slurm, self.config = slurm, config
        self.id, self.folder = answer["job"], Path(answer["folder"])

    def step(self) -> int:
        """The last step in the metrics."""
        path = self.config.run_folder / "metrics.jsonl"
        return max((record["step"] for record in read_metrics(path)), default=0) if path.is_file() else 0

    def wait_for_step(self, step: int) -> None:
        self.slurm.wait_for(lambda: self.step() >= step, f"step {step} of job {self.id}")

    def wait_for_checkpoint(self, step: int) -> None:
        def there() -> bool:
            newest = newest_checkpoint(self.config.run_folder)
            return newest is not None and int(newest.name.removeprefix("step_")) >= step

        self.slurm.wait_for(there, f"checkpoint {step} of job {self.id}")

    def events(self, kind: str) -> list[dict]:
        return [event for event in records(self.folder / "events.jsonl") if event["event"] == kind]

    def log(self) -> str:
        return (self.folder / f"slurm-{self.id}.log").read_text()

    def losses(self) -> list[float]:
        found = read_metrics(self.config.run_folder / "metrics.jsonl")
        return [record["loss"] for record in found if record["kind"] == "train"]


@pytest.fixture
def submit(slurm: Cluster, tiny, tmp_path: Path) -> Callable[..., Job]:
    """`submit(*overrides, options=(), site="")`: a two-node job."""

    def send(*overrides: str, options: tuple[str, ...] = (), site: str = "") -> Job:
        config = tiny(1, *LONG, *overrides)
        (tmp_path / "config.yaml").write_text(dump_config(config))
        (tmp_path / "site.yaml").write_text(SITE + site)
        command = ["submit", str(tmp_path / "config.yaml"), "--site", str(tmp_path / "site.yaml"), "--nodes", "2"]
        done = cola(*command, *options, "--json", env=slurm.environment)
        assert done.returncode == 0, done.stderr
        return Job(slurm, config, json.loads(done.stdout))

    return send


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the same run on two processes that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = load_config("tiny", [*TINY, *LONG, "stage=1", f"data.path={corpus}", f"runs_folder={folder}"])
    run_ranks(train, 2, config, False)
    found = read_metrics(config.run_folder / "metrics.jsonl")
    return [record["loss"] for record in found if record["kind"] == "train"]


def assert_nothing_lost(job: Job, undisturbed: list[float], tries: int | tuple[int, ...]) -> None:
    state = job.slurm.run_to_the_end(job.id)
    assert state == "COMPLETED", job.log()[-4000:]
    assert job.losses() == undisturbed
    expected = (tries,) if isinstance(tries, int) else tries
    assert len(job.events("try")) in expected, job.events("try")


@pytest.mark.parametrize("launcher", [AGENT_SLOWLY, TASKS_SLOWLY])
def test_a_job_on_two_nodes_trains_to_its_end(submit, undisturbed, launcher: str) -> None:
    job = submit(site=f"launcher: {launcher}\n")
    assert_nothing_lost(job, undisturbed, tries=1)
    assert_kept_what_it_ran_with(job)


def assert_kept_what_it_ran_with(job: Job) -> None:
    for name in ("job.sbatch", "config.yaml", "site.yaml", "git.txt", "git.diff", "environment.txt", "supervise.py"):
        assert (job.folder / name).is_file()


@pytest.mark.slow
def test_a_requeue_in_the_middle(submit, undisturbed, slurm: Cluster) -> None:
    job = submit()
    job.wait_for_checkpoint(20)
    slurm.commands("scontrol", "requeue", job.id)
    assert_nothing_lost(job, undisturbed, tries=2)


@pytest.mark.parametrize("launcher", [AGENT_SLOWLY, TASKS_SLOWLY])
def test_the_signal_before_the_time_limit_saves_and_requeues(submit, undisturbed, slurm: Cluster, launcher) -> None:
    job = submit("training.checkpoint.every=1000", site=f"launcher: {launcher}\n")
    job.wait_for_step(5)
    slurm.commands("scancel", "--batch", "--signal=USR1", job.id)
    assert_nothing_lost(job, undisturbed, tries=2)
    (requeue,) = job.events("requeue")
    assert requeue["reason"] == "stopped by SIGUSR1"
    assert job.events("try")[1]["checkpoint"] >= 5


@pytest.mark.slow
def test_pre_emption_saves_and_the_job_comes_back(submit, undisturbed, slurm: Cluster) -> None:
    job = submit("training.checkpoint.every=1000")
    job.wait_for_step(5)
    urgent = slurm.commands(
        "sbatch", "--parsable", "--partition=high", "--exclusive", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1"
    )
    assert_nothing_lost(job, undisturbed, tries=2)
    assert slurm.job(urgent)["JobState"] == "COMPLETED"
    assert job.events("try")[1]["checkpoint"] >= 5


@pytest.mark.parametrize("launcher", ["agent", TASKS_SLOWLY])
def test_a_killed_rank(submit, undisturbed, slurm: Cluster, launcher: str) -> None:
    job = submit(site=f"launcher: {launcher}\n")
    job.wait_for_checkpoint(20)
    slurm.ranks()[1].kill()
    assert_nothing_lost(job, undisturbed, tries=2)
    end, _ = job.events("end")
    assert end["code"] == 128 + signal.SIGKILL and len(end["failures"]) == 1
    assert_kept_what_it_ran_with(job)


@pytest.mark.slow
def test_a_killed_step_daemon(submit, undisturbed, slurm: Cluster) -> None:
    job = submit(options=("--set", "pause_seconds=0.5"))
    job.wait_for_checkpoint(20)
    rank = slurm.ranks()[1]
    daemon = next(each for each in rank.parents() if "slurmstepd" in each.name())
    daemon.kill()
    assert_nothing_lost(job, undisturbed, tries=(1, 2))


@pytest.mark.slow
def test_a_node_that_goes_down(submit, undisturbed, slurm: Cluster) -> None:
    job = submit()
    job.wait_for_checkpoint(20)
    slurm.kill_node("n2")
    slurm.wait_for(lambda: slurm.states()["n2"].rstrip("*") in ("down", "idle"), "the node down")
    slurm.start_node("n2")
    # The first failure may be noticed before Slurm knows that the node is down.
    assert_nothing_lost(job, undisturbed, tries=(2, 3))


@pytest.mark.slow
def test_a_truncated_newest_checkpoint(submit, undisturbed, slurm: Cluster) -> None:
    job = submit()
    job.wait_for_checkpoint(30)
    slurm.commands("scontrol", "requeue", job.id)
    slurm.wait_for(lambda: slurm.job(job.id)["JobState"] == "PENDING" and not slurm.ranks(), "the requeue")
    newest = newest_checkpoint(job.config.run_folder)
    victim = max((newest / "tensors").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    os.truncate(victim, victim.stat().st_size // 2)
    assert_nothing_lost(job, undisturbed, tries=2)
    assert newest.name in job.log() and (newest.parent / f"damaged_{newest.name}").is_dir()


@pytest.mark.slow
def test_a_run_that_would_fail_again_is_not_tried_again(submit, slurm: Cluster, tmp_path: Path) -> None:
    job = submit("data.path=/nowhere")
    assert slurm.run_to_the_end(job.id) == "FAILED"
    assert slurm.job(job.id)["ExitCode"] in ("1:0", "2:0")
    assert len(job.events("try")) == 1
    assert "/nowhere" in job.log() and "Traceback" not in job.log()


@pytest.mark.slow
def test_tries_without_progress_are_bounded(submit, slurm: Cluster) -> None:
    job = submit("training.checkpoint.every=1000", options=("--set", "tries=2"))
    for _ in range(2):
        slurm.wait_for(lambda: len(slurm.ranks()) == 2, "two ranks")
        rank = slurm.ranks()[0]
        rank.kill()
        psutil.wait_procs([rank], 10)
        time.sleep(1)
    assert slurm.run_to_the_end(job.id) == "FAILED"
    assert len(job.events("try")) == 2
    assert "2 tries in a row brought no new checkpoint" in job.log()


@pytest.mark.slow
def test_a_node_that_the_preflight_names_is_left_out(submit, undisturbed, slurm: Cluster, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    driver = tmp_path / "bin" / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho the GPU fell off the bus\nexit 15\n")
    prolog = tmp_path / "prolog"
    prolog.write_text(f'#!/bin/sh\n[ $SLURMD_NODENAME = n2 ] && echo "export PATH={driver.parent}:$PATH"\nexit 0\n')
    for script in (driver, prolog):
        script.chmod(0o755)
    job = submit(options=("--set", "preflight=true"), site=f"srun_arguments: [--task-prolog={prolog}]\n")
    assert_nothing_lost(job, undisturbed, tries=2)
    first, second = job.events("try")
    assert (first["nodes"], second["nodes"]) == (["n1", "n2"], ["n1", "n3"])
    assert "the GPU fell off the bus" in job.events("end")[0]["failures"]["n2"]
    assert "bad node n2" in job.log()


@pytest.mark.slow
def test_a_node_that_never_answers_is_left_out(submit, undisturbed, slurm: Cluster, tmp_path: Path) -> None:
    prolog = tmp_path / "prolog"
    prolog.write_text("#!/bin/sh\n[ $SLURMD_NODENAME = n2 ] && sleep 1000\nexit 0\n")
    prolog.chmod(0o755)
    site = f"srun_arguments: [--task-prolog={prolog}]\nrendezvous_seconds: 12\n"
    job = submit(options=("--set", "wait_seconds=3"), site=site)
    assert_nothing_lost(job, undisturbed, tries=2)
    first, second = job.events("try")
    assert (first["nodes"], second["nodes"]) == (["n1", "n2"], ["n1", "n3"])
    assert job.events("end")[0]["failures"] == {"n2": "not started: no answer"}


@pytest.mark.slow
def test_a_cancelled_job_stays_cancelled(submit, slurm: Cluster) -> None:
    job = submit("training.steps=100000", "training.checkpoint.every=100000")
    job.wait_for_step(3)
    done = cola("cancel", job.config.run_folder, env=slurm.environment)
    assert done.returncode == 0 and job.id in done.stdout
    slurm.wait_for(lambda: slurm.job(job.id)["JobState"] == "CANCELLED", "the end of the job")
    slurm.wait_for(lambda: not slurm.ranks(), "the end of its ranks")
    assert newest_checkpoint(job.config.run_folder) is not None, "it saved before it ended"


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_nothing(submit, slurm: Cluster, tmp_path: Path) -> None:
    """Ranks, agents, tasks' daemons and the whole job are hit while it starts, trains, saves and ends."""
    chooser, steps = random.Random(6), 3000
    overrides = [f"training.steps={steps}", "training.checkpoint.every=100", "training.log.every=50"]
    job = submit(*overrides, options=("--set", "tries=30", "--set", "pause_seconds=0.2", "--set", "wait_seconds=15"))
    kills = 0
    while kills < 20 and slurm.job(job.id)["JobState"] not in TERMINAL:
        slurm.start_again(job.id)
        time.sleep(chooser.uniform(3, 14))
        kind = chooser.choice(["rank", "rank", "agent", "requeue", "signal"])
        if slurm.job(job.id)["JobState"] != "RUNNING":
            continue
        if kind == "requeue":
            slurm.commands("scontrol", "requeue", job.id, check=False)
        elif kind == "signal":
            slurm.commands("scancel", "--batch", "--signal=USR1", job.id, check=False)
        else:
            ranks = slurm.ranks()
            if not ranks:
                continue
            with contextlib.suppress(psutil.NoSuchProcess):
                victim = chooser.choice(list(ranks.values()))
                (victim if kind == "rank" else victim.parent()).kill()
        kills += 1
    assert slurm.run_to_the_end(job.id, 600) == "COMPLETED", job.log()[-4000:]
    assert kills == 20, "the run was over before"
    straight = load_config(
        "tiny",
        [*TINY, *LONG, *overrides, "stage=1", f"data.path={job.config.data.path}", f"runs_folder={tmp_path / 's'}"],
    )
    run_ranks(train, 2, straight, False, timeout=600)
    of_straight = [r["loss"] for r in read_metrics(straight.run_folder / "metrics.jsonl") if r["kind"] == "train"]
    assert job.losses() == of_straight
