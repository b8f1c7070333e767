"""Runs that die: during a save, in the middle of training, by signal, on a full disk."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cola_megatron.checkpoint.errors import CheckpointError
from cola_megatron.checkpoint.find import newest_checkpoint
from cola_megatron.checkpoint.load import read_weights
from cola_megatron.config import RunConfig, dump_config
from cola_megatron.errors import ExitCode
from cola_megatron.records.metrics import read_metrics
from cola_megatron.training.loop import train
from tests.commands import Command
from tests.support import small_disk

Started = subprocess.Popen | Command


def start(config: RunConfig, tmp_path: Path, anew: bool = False) -> Started:
    """`cola train` of this config in a session of its own; `anew`: not forked, but from an interpreter's start."""
    file = tmp_path / f"{config.name}.yaml"
    file.write_text(dump_config(config))
    if not anew:
        return Command(("train", file))
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "launchers.cli", "train", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition, process: Started, seconds: float = 60.0) -> None:
    """Polls often, for what it waits for may last milliseconds, but leaves the core to the process."""
    began = time.monotonic()
    while not condition():
        time.sleep(0.0005)
        if process.poll() is not None or time.monotonic() - began > seconds:
            process.kill()
            raise AssertionError(f"the process ended or hung first: {process.communicate()}")


def losses(config: RunConfig) -> list[tuple[int, float]]:
    records = read_metrics(config.run_folder / "metrics.jsonl")
    return [(record["step"], record["loss"]) for record in records if record["kind"] == "train"]


def assert_same_end(first: RunConfig, second: RunConfig) -> None:
    assert losses(first) == losses(second)
    expected, found = (read_weights(newest_checkpoint(config.run_folder))[1] for config in (first, second))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_a_kill_during_a_save_leaves_the_previous_checkpoint_good(tiny, tmp_path):
    # A larger vocabulary head makes a save last long enough to be hit.
    size = ["model.vae.hidden_size=256", "model.vae.ffn_hidden_size=1024", "training.checkpoint.every=1"]
    straight = tiny(1, "name=straight", *size)
    train(straight, progress=False)
    killed = tiny(1, "name=killed", *size)
    folder, process = killed.run_folder / "checkpoints", start(killed, tmp_path)
    wait_for(lambda: (folder / ".saving_step_00000003").exists(), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = newest_checkpoint(killed.run_folder)
    assert left.name == "step_00000002" and (folder / ".saving_step_00000003").exists()
    train(killed, progress=False)
    assert_same_end(straight, killed)
    assert not list(folder.glob(".saving_*"))


@pytest.mark.parametrize(
    ("number", "anew"),
    [
        (signal.SIGTERM, True),
        (signal.SIGUSR1, False),
        (signal.SIGINT, False),
        (signal.SIGHUP, False),
    ],
)
def test_a_signal_to_the_process_group_ends_the_step_saves_and_resumes(tiny, tmp_path, number, anew):
    """As schedulers send it: the loader's worker gets it too."""
    longer = ["training.steps=4000", "training.log.every=1", "training.loader_workers=1"]
    config = tiny(1, *longer)
    process = start(config, tmp_path, anew)
    metrics = config.run_folder / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, process)
    os.killpg(process.pid, number)
    output = "".join(process.communicate(timeout=60))
    assert process.returncode == ExitCode.STOPPED and "run again to go on" in output, output
    stopped_at = losses(config)[-1][0]
    assert newest_checkpoint(config.run_folder).name == f"step_{stopped_at:08d}" and stopped_at < 4000
    more = tiny(1, *longer, f"training.stop_after={stopped_at + 2}")
    assert train(more, progress=False).step == stopped_at + 2


def test_a_full_disk_is_one_clear_error_and_the_previous_checkpoint_stays(tiny, tmp_path):
    with small_disk(tmp_path / "disk", kilobytes=2000) as disk:
        config = tiny(1, f"runs_folder={disk}", "training.checkpoint.every=1", "training.checkpoint.keep_last=9")
        with pytest.raises(CheckpointError, match=r"could not be written.*the disk has space") as failure:
            train(config, progress=False)
        assert "\n" not in str(failure.value)
        good = newest_checkpoint(config.run_folder)
        assert good is not None
        read_weights(good)


def remove_a_shard(shards: Path) -> None:
    next((shards / "train").rglob("*.mds")).unlink()


def flip_a_byte(shards: Path) -> None:
    path = next((shards / "train").rglob("*.mds"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove_the_manifest(shards: Path) -> None:
    (shards / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "named", "anew"),
    [
        (remove_a_shard, "shard.00000.mds", True),
        (flip_a_byte, "shard.00000.mds", False),
        (remove_the_manifest, "manifest.json", False),
    ],
)
def test_damaged_shards_stop_a_run_before_its_first_step_with_one_line(tiny, corpus, tmp_path, damage, named, anew):
    shards = tmp_path / "shards"
    shutil.copytree(corpus, shards)
    damage(shards)
    config = tiny(1, f"data.path={shards}")
    process = start(config, tmp_path, anew)
    output = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    last = output.strip().splitlines()[-1]
    assert last.startswith("cola: ") and named in last and "cola prep" in last
    assert "Traceback" not in output


@pytest.mark.slow
def test_torchrun_trains_with_two_processes(tiny, tmp_path):
    config = tiny(2, "training.steps=2")
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    finished = subprocess.run(
        [*command, "-m", "launchers.cli", "train", str(file), "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert finished.stdout.count('"finished": true') == 1
    assert len(losses(config)) == 2
