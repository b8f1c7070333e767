"""A rank that dies, fails or falls silent: the others end in time with a line that names it, and the run resumes."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import psutil
import pytest
import torch
import torch.distributed as dist

from cola_megatron.checkpoint.find import newest_checkpoint
from cola_megatron.checkpoint.load import read_weights
from cola_megatron.config import RunConfig, dump_config
from cola_megatron.errors import ExitCode
from cola_megatron.parallel import PeerWatch, initialize_parallel
from cola_megatron.parallel.heartbeats import Silence
from cola_megatron.training.engine import Engine
from cola_megatron.training.loop import train
from tests.ranks import RankEnd, ends_of_ranks, run_ranks

TIMEOUT = 2.0
RANK_0 = r"rank 0 \(\S+, process \d+\)"
RESUMES = "this job ends: started again, it resumes from its newest checkpoint"


# ---- what ranks do (in processes of their own) ----------------------------------------------------------------------


def kill_this_rank() -> None:
    time.sleep(TIMEOUT / 4)  # the others have heard of this rank
    os.kill(os.getpid(), signal.SIGKILL)


def be_killed_on_a_machine_of_its_own(lost: int, timeout: float) -> None:
    """No rank sees the processes of the others, as on other machines."""
    os.pidfd_open = forbidden
    one_rank_acts(lost, kill_this_rank, wait_in_a_collective, timeout)


def forbidden(process: int) -> int:
    raise PermissionError(process)


def stop_this_rank() -> None:
    time.sleep(TIMEOUT / 4)  # the others have heard of this rank
    os.kill(os.getpid(), signal.SIGSTOP)


def damaged_shard() -> None:
    raise ValueError("shard 7 is damaged")


def wait_in_a_collective() -> None:
    """For a tensor that no one will send: nothing in Python can end this."""
    peer = next(rank for rank in range(dist.get_world_size()) if rank != dist.get_rank())
    dist.recv(torch.zeros(1), src=peer)


def one_rank_acts(acting: int, act: Callable[[], None], others: Callable[[], None], timeout: float) -> None:
    """Inside a watch, in step 41, one rank acts while the others do something else."""
    groups = initialize_parallel()
    with PeerWatch(groups, timeout) as watch:
        watch.step = 41
        groups.barrier()
        (act if groups.rank == acting else others)()


def one_collective_times_out(timeout: float) -> None:
    """Rank 1 fails in a collective that rank 0, alive, never joins."""
    groups = initialize_parallel()
    impatient = dist.new_group(timeout=timedelta(seconds=0.5))
    with PeerWatch(groups, timeout) as watch:
        watch.step = 41
        groups.barrier()
        if groups.rank == 1:
            dist.all_reduce(torch.zeros(1), group=impatient)
        wait_in_a_collective()


def be_slow() -> None:
    """Sleeps for longer than the timeout, then keeps Python's lock for half of it, as C++ code may."""
    time.sleep(1.5 * TIMEOUT)
    ctypes.PyDLL(None).usleep(int(0.5 * TIMEOUT * 1e6))
    dist.barrier()


def end_early() -> None:
    """Returns, so that this rank's watch and process end in good order."""


def outlive_the_other() -> None:
    time.sleep(1.5 * TIMEOUT)


def three_watches() -> tuple[list[float], list[str]]:
    """Seconds that each of three watches in a row took to end, and the threads that they left."""
    groups, seconds = initialize_parallel(), []
    for _ in range(3):
        with PeerWatch(groups, timeout=60.0):
            groups.barrier()
            began = time.monotonic()
        seconds.append(time.monotonic() - began)
    return seconds, [thread.name for thread in threading.enumerate() if thread.name.startswith("peer watch")]


# ---- what the others say --------------------------------------------------------------------------------------------


def assert_named(ends: list[RankEnd], lost: int, said: str, within: float = TIMEOUT) -> None:
    """Every rank but the lost one ended by itself, in time, with its exit code and one line."""
    for rank, end in enumerate(ends):
        if rank != lost:
            assert end.exit_code == ExitCode.RANK_LOST, f"rank {rank}: {end}"
            assert re.fullmatch(rf"cola: rank {lost} \(\S+, process \d+\) {said}; {RESUMES}", end.last_line), end.errors
            assert end.errors.count(RESUMES) == 1 and "Traceback" not in end.errors
            assert end.at - ends[lost].at < within, f"rank {rank} took {end.at - ends[lost].at:.1f} s"


@pytest.mark.parametrize("lost", [0, 2])
def test_a_killed_rank_is_named_by_ranks_that_wait_in_a_collective(lost):
    ends = ends_of_ranks(one_rank_acts, 3, lost, kill_this_rank, wait_in_a_collective, TIMEOUT)
    assert ends[lost].exit_code == -signal.SIGKILL
    assert_named(ends, lost, r"died in step 41: killed, out of memory or crashed; see the kernel's log on \S+")


def test_a_rank_that_falls_silent_is_named():
    ends = ends_of_ranks(one_rank_acts, 3, 1, stop_this_rank, wait_in_a_collective, TIMEOUT, stopped=(1,))
    assert_named(ends, 1, rf"has not been heard of for {TIMEOUT:g} s, in step 41: .*")


def test_a_rank_that_dies_on_another_machine_is_named():
    ends = ends_of_ranks(be_killed_on_a_machine_of_its_own, 3, 1, TIMEOUT)
    assert_named(ends, 1, rf"has not been heard of for {TIMEOUT:g} s, in step 41: .*", within=3 * TIMEOUT)


def test_a_store_that_is_gone_is_laid_to_rank_0():
    first, *others = ends_of_ranks(be_killed_on_a_machine_of_its_own, 3, 0, TIMEOUT)
    for end in others:
        assert end.exit_code == ExitCode.RANK_LOST and end.at - first.at < TIMEOUT
        assert re.match(rf"cola: {RANK_0}, its machine or its launcher is lost in step 41", end.last_line), end.errors


def test_a_store_that_falls_silent_is_laid_to_rank_0():
    ends = ends_of_ranks(one_rank_acts, 3, 0, stop_this_rank, wait_in_a_collective, TIMEOUT, stopped=(0,))
    for end in ends[1:]:
        assert end.exit_code == ExitCode.RANK_LOST
        assert re.match(rf"cola: {RANK_0}, its machine or its launcher is lost in step 41", end.last_line), end.errors
        assert f"127.0.0.1 is gone (no answer for {TIMEOUT:g} s); {RESUMES}" in end.last_line


def test_a_rank_that_raises_keeps_its_error_and_the_others_name_it():
    ends = ends_of_ranks(one_rank_acts, 3, 1, damaged_shard, wait_in_a_collective, TIMEOUT)
    assert ends[1].exit_code == 1 and ends[1].last_line == "ValueError: shard 7 is damaged"
    assert_named(ends, 1, "failed in step 41: ValueError: shard 7 is damaged")


def test_a_collective_that_fails_while_every_rank_lives_raises_its_own_error():
    ends = ends_of_ranks(one_collective_times_out, 2, 1.0)
    assert ends[1].last_line.startswith("RuntimeError: ") and "imed out" in ends[1].last_line
    assert_named(ends, 1, "failed in step 41: RuntimeError: .*imed out.*")


@pytest.mark.parametrize("slow", [0, 1])
def test_a_slow_rank_is_not_lost(slow):
    ends = ends_of_ranks(one_rank_acts, 2, slow, be_slow, dist.barrier, TIMEOUT)
    assert [end.exit_code for end in ends] == [0, 0], ends


def test_a_rank_that_is_done_is_not_lost():
    ends = ends_of_ranks(one_rank_acts, 2, 1, end_early, outlive_the_other, TIMEOUT)
    assert [end.exit_code for end in ends] == [0, 0], ends
    assert ends[0].at - ends[1].at > TIMEOUT


def test_watches_one_after_the_other_end_at_once_and_leave_no_thread():
    for seconds, threads in run_ranks(three_watches, 2):
        assert max(seconds) < 0.5 and not threads


def test_a_job_of_one_has_no_watch():
    seconds, threads = run_ranks(three_watches, 1)[0]
    assert max(seconds) < 0.1 and not threads


def test_a_process_that_was_held_up_has_heard_of_nobody_in_that_time(monkeypatch):
    clock = iter([0.0, 1.0, 2.0, 100.0, 101.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    silence, beat = Silence(longest_look=2.0), b"-"
    for _ in range(4):
        silence.count({1: beat})
    # Silent from the second look on: 1 second, 98 that count as 2, and 1.
    assert silence.seconds(1) == 4.0


# ---- whole runs -----------------------------------------------------------------------------------------------------


def train_until_step(config: RunConfig, dying: int, at: int) -> None:
    """Training in which one rank kills itself in the middle of a step: between two of its micro-batches."""
    whole_step = Engine.step

    def step(self, batches, number, *rest):
        def first_micro_batch_only():
            yield next(batches)
            kill_this_rank()

        dies = dist.get_rank() == dying and number + 1 == at
        return whole_step(self, first_micro_batch_only() if dies else batches, number, *rest)

    Engine.step = step
    train(config, progress=False)


def final_weights(config: RunConfig) -> dict[str, torch.Tensor]:
    checkpoint = newest_checkpoint(config.run_folder)
    assert checkpoint.name == f"step_{config.training.steps:08d}"
    return read_weights(checkpoint)[1]


@pytest.mark.parametrize(("world_size", "lost"), [(2, 1), (3, 0)])
def test_a_run_that_loses_a_rank_in_the_middle_of_a_step_ends_and_resumes_to_the_same_bits(tiny, world_size, lost):
    batches = ["training.global_batch_size=12", f"training.micro_batch_size={6 // world_size}"]
    sizes = [*batches, "training.checkpoint.every=2", "parallel.peer_timeout_seconds=10"]
    straight, killed = tiny(2, "name=straight", *sizes), tiny(2, "name=killed", *sizes)
    run_ranks(train, world_size, straight, False)
    ends = ends_of_ranks(train_until_step, world_size, killed, lost, 4)
    assert ends[lost].exit_code == -signal.SIGKILL
    assert_named(ends, lost, "died in step 4: .*", within=10)
    assert newest_checkpoint(killed.run_folder).name == "step_00000002"
    run_ranks(train, world_size, killed, False)
    expected, found = final_weights(straight), final_weights(killed)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_under_torchrun_the_message_is_out_before_the_launcher_kills(tiny, tmp_path):
    """The launcher sends SIGTERM to the ranks that remain, which end their step first: that step never ends."""
    config = tiny(1, "training.steps=100000", "parallel.peer_timeout_seconds=20")
    file, errors = tmp_path / "run.yaml", tmp_path / "errors"
    file.write_text(dump_config(config))
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with errors.open("w") as stderr:
        launcher = subprocess.Popen(
            [*command, "-m", "launchers.cli", "train", str(file)], stderr=stderr, stdout=stderr, start_new_session=True
        )
    try:
        metrics = config.run_folder / "metrics.jsonl"
        until = time.monotonic() + 90
        while not (metrics.exists() and metrics.read_text().count("\n") > 3):
            assert launcher.poll() is None and time.monotonic() < until, errors.read_text()
            time.sleep(0.05)
        children = psutil.Process(launcher.pid).children()
        ranks = {child.environ()["RANK"]: child for child in children if "RANK" in child.environ()}
        ranks["1"].kill()
        killed_at = time.monotonic()
        ranks["0"].wait(20)
        assert time.monotonic() - killed_at < 15
        assert launcher.wait(20) == 1
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    said = [line for line in errors.read_text().splitlines() if line.startswith("cola: ")]
    assert len(said) == 1 and re.match(rf"cola: rank 1 \(\S+, process {ranks['1'].pid}\) died in step \d+", said[0])
