"""A job that makes no progress: every rank writes its stacks, and the job ends."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import torch.distributed as dist

from cola_megatron.errors import ExitCode
from cola_megatron.parallel import HangWatch, PeerWatch, initialize_parallel
from tests.ranks import ends_of_ranks

PATIENCE = 1.5


def stuck_forever() -> None:
    time.sleep(60)


def wait_for_the_others() -> None:
    dist.barrier()


def train_until_one_hangs(folder: Path, hanging: int) -> None:
    groups = initialize_parallel()
    hang = HangWatch(folder, PATIENCE, groups.rank, groups.world_size)
    with hang, PeerWatch(groups, 30.0, hang.write_stacks) as watch:
        hang.peers = watch
        for watch.step in range(1, 4):
            hang.progress()
            time.sleep(PATIENCE / 2)
        watch.step = 4
        (stuck_forever if groups.rank == hanging else wait_for_the_others)()


def test_all_ranks_write_their_stacks_and_end(tmp_path: Path) -> None:
    ends = ends_of_ranks(train_until_one_hangs, 3, tmp_path, 1)
    folder = tmp_path / "stacks" / "step_00000004"
    for rank, end in enumerate(ends):
        assert end.exit_code == ExitCode.HUNG, end
        assert "made no progress for" in end.last_line and "in step 4" in end.last_line
        stacks = (folder / f"rank_{rank:05d}.txt").read_text()
        assert ("stuck_forever" if rank == 1 else "wait_for_the_others") in stacks


def hang_at_the_start(folder: Path) -> None:
    with HangWatch(folder, PATIENCE, 0, 1):
        stuck_forever()


def test_one_process_hangs_at_the_start(tmp_path: Path) -> None:
    (end,) = ends_of_ranks(hang_at_the_start, 1, tmp_path)
    assert end.exit_code == ExitCode.HUNG
    assert "before the first step" in end.last_line
    assert "stuck_forever" in (tmp_path / "stacks" / "step_00000000" / "rank_00000.txt").read_text()


def work_slowly(folder: Path) -> None:
    with HangWatch(folder, PATIENCE, 0, 1) as hang:
        for _ in range(5):
            time.sleep(PATIENCE / 2)
            hang.progress()


def never_lose_patience(folder: Path) -> None:
    with HangWatch(folder, None, 0, 1):
        time.sleep(PATIENCE)


def test_progress_and_no_limit_keep_a_job_alive(tmp_path: Path) -> None:
    for function in (work_slowly, never_lose_patience):
        (end,) = ends_of_ranks(function, 1, tmp_path)
        assert end.exit_code == 0, end
    assert not (tmp_path / "stacks").exists()


def test_a_signal_shows_the_stacks_and_the_job_goes_on(tmp_path: Path) -> None:
    code = (
        "import time; from pathlib import Path; from cola_megatron.parallel import HangWatch\n"
        "def slow_part(): print('there', flush=True); time.sleep(2)\n"
        f"with HangWatch(Path({str(tmp_path)!r}), None, 0, 1): slow_part()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGUSR2)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0 and "slow_part" in errors
