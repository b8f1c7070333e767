"""The loader in real runs: what it writes into the metrics, its errors, and resuming with other ranks."""

import logging
import multiprocessing
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from cola_megatron.checkpoint.errors import CheckpointError
from cola_megatron.config import RunConfig, load_config
from cola_megatron.data import ShardError, TokenShards
from cola_megatron.errors import UserError
from cola_megatron.records.metrics import read_metrics
from cola_megatron.training.batches import MicroBatch, MicroBatches
from cola_megatron.training.loop import train
from tests.ranks import ends_of_ranks, run_ranks
from tests.shard_folders import shard_files, write_folder
from tests.support import TINY

SOURCES = {"web": 57, "books": 23}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., RunConfig]:
    """`build(folder, *overrides)`: a stage-1 run on a prepared folder or URL."""

    def config(folder: Path | str, *overrides: str) -> RunConfig:
        return load_config(
            "tiny", [*TINY, "stage=1", f"data.path={folder}", f"runs_folder={tmp_path / 'runs'}", *overrides]
        )

    return config


def run(config: RunConfig) -> None:
    train(config, progress=False)


def steps(config: RunConfig) -> list[dict]:
    records = read_metrics(config.run_folder / "metrics.jsonl")
    return [record for record in records if record["kind"] == "train"]


def losses(config: RunConfig) -> list[float]:
    return [record["loss"] for record in steps(config)]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_wait_for_data_is_measured(
    build: Callable, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = MicroBatches.__getitem__

    def slow(batches: MicroBatches, index: int) -> MicroBatch:
        if index == 8:  # the first micro-batch of the fifth step
            time.sleep(1.5)
        return read(batches, index)

    monkeypatch.setattr(MicroBatches, "__getitem__", slow)
    config = build(write_folder(tmp_path / "folder", SOURCES), f"training.loader_workers={workers}")
    run(config)
    waits = [record["data/wait"] for record in steps(config)]
    assert len(waits) == 6 and all(wait >= 0 for wait in waits)
    assert 0.3 < waits[4] < 2.5 and waits[4] > 3 * waits[3]
    assert all("data/skipped_samples" not in record for record in steps(config))


@pytest.mark.parametrize("shard_format", ["mds", "webdataset"])
def test_a_remote_folder_trains_like_a_local_one_and_resumes_on_other_ranks(
    build: Callable, tmp_path: Path, shard_format: str
) -> None:
    folder = write_folder(tmp_path / "folder", SOURCES, shard_format)
    order = "data.shuffle_block_shards=2"
    straight = build(folder, order, "name=straight", "training.steps=12")
    run(straight)
    far = [f"file://{folder}", order, "name=far", "training.steps=12"]
    run_ranks(run, 2, build(*far, "training.stop_after=7"))  # in the middle of an epoch of ten steps
    run(build(*far, "training.micro_batch_size=8", "training.loader_workers=1"))
    assert losses(build(*far)) == pytest.approx(losses(straight), rel=1e-3)
    with pytest.raises(CheckpointError, match=r"data\.shuffle_block_shards was 2, now None"):
        run(build(far[0], *far[2:], "training.stop_after=7"))


def damaged(folder: Path) -> Path:
    """A shard of `web` with a token behind the vocabulary in its first sequence, which only a hash or a read finds."""
    path = [path for path in shard_files(folder) if "web/" in str(path)][2]
    content = bytearray(path.read_bytes())
    content[-20 * 32 : -19 * 32] = b"\xff" * 32
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_found_while_reading_is_one_line(build: Callable, tmp_path: Path, workers: int) -> None:
    folder = write_folder(tmp_path / "folder", SOURCES)
    shard = damaged(folder)
    config = build(folder, "data.verify=size", f"training.loader_workers={workers}", "training.steps=20")
    with pytest.raises(ShardError, match=rf"^{re.escape(str(shard))}: sample \d holds token id 65535") as caught:
        run(config)
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children(), "a process whose exception is held would wait for them for ever"


@pytest.mark.parametrize("verify", ["hash", "size"])
def test_skipped_samples_are_counted_alike_on_any_ranks(build: Callable, tmp_path: Path, verify: str, caplog) -> None:
    folder = write_folder(tmp_path / "folder", SOURCES)
    shard = damaged(folder)
    skip = ["data.bad_shards=skip", f"data.verify={verify}", "training.steps=10"]
    alone, together = build(folder, *skip, "name=alone"), build(folder, *skip, "name=together")
    with caplog.at_level(logging.WARNING):
        run(alone)
    named = [record.getMessage() for record in caplog.records if shard.name in record.getMessage()]
    assert len(named) == 1 and str(shard) in named[0] and "data.bad_shards=skip" in named[0]
    run_ranks(run, 2, together)
    counts = [record["data/skipped_samples"] for record in steps(alone)]
    assert sum(counts) == (10 if verify == "hash" else 1)  # one epoch: the whole shard, or its one bad sequence
    assert [record["data/skipped_samples"] for record in steps(together)] == counts
    assert losses(together) == pytest.approx(losses(alone), rel=1e-3)


def lose_a_shard_on_one_rank(config: RunConfig) -> None:
    """The second tensor-parallel rank does not see what the first one sees."""
    read = TokenShards.__getitem__

    def other(shards: TokenShards, index: int):
        if dist.get_rank() == 1 and index < 20:
            raise shards._row_error(shards._shards[0], index, "is not here")
        return read(shards, index)

    TokenShards.__getitem__ = other
    run(config)


def test_ranks_of_one_replica_must_see_the_same_files(build: Callable, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", SOURCES)
    config = build(folder, "data.bad_shards=skip", "parallel.tensor_parallel_size=2")
    for end in ends_of_ranks(lose_a_shard_on_one_rank, 2, config):
        assert end.exit_code == 1 and "ranks of one replica could not read different samples" in end.last_line


def test_a_worker_that_dies_is_one_line(build: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MicroBatches, "__getitem__", lambda batches, index: os._exit(9))
    with pytest.raises(UserError, match=r"a loader worker died: .*lower training\.loader_workers") as caught:
        run(build(write_folder(tmp_path / "folder", SOURCES), "training.loader_workers=1"))
    assert "\n" not in str(caught.value)
