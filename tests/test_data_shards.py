"""Reading of prepared shards in both formats, by any number of ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import webdataset
from torch.utils.data import DataLoader

from cola_megatron.config import RunConfig, load_config
from cola_megatron.data import GlobalOrder, TokenShards, held_out_samples, training_samples
from cola_megatron.data.manifest import MixtureRecord
from cola_megatron.data.streaming_backend import MDSReader
from cola_megatron.training.batches import MicroBatches
from tests.shard_folders import LENGTH, PER_SHARD, VOCABULARY, read, shard_files, whole, write_folder
from tests.support import TINY

FORMATS = ["mds", "webdataset"]
SOURCES = {"web": 57, "books": 23}
MIXTURE = {"web": MixtureRecord(epochs=1.0, weight=1.0), "books": MixtureRecord(epochs=1.0, weight=3.0)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default cache folder of each test is its own."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture(params=FORMATS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A prepared folder of two sources, nine shards."""
    return write_folder(tmp_path / "folder", SOURCES, request.param)


# ---- whole folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("shard_format", FORMATS)
def test_sequences_are_those_that_were_written(tmp_path: Path, shard_format: str, compression: str | None) -> None:
    shards = TokenShards(write_folder(tmp_path / "folder", SOURCES, shard_format, compression), "train")
    tokens = read(shards, len(shards))
    np.testing.assert_array_equal(tokens, whole("train", SOURCES))
    assert tokens.dtype == np.int64
    assert (shards.end_of_text_id, shards.padding_id, shards.vocab_size) == (0, 2, VOCABULARY)
    assert shards.tokens == tokens.size and shards.sequence_length == LENGTH
    assert [(stream.name, stream.first, len(stream)) for stream in shards.streams] == [
        ("web", 0, 57),
        ("books", 57, 23),
    ]
    assert shards.tokenizer_path.is_file()
    shards[0][:] = 7  # the array is the caller's own
    assert (shards[0] != 7).any()
    for index in (-1, len(shards)):
        with pytest.raises(IndexError):
            shards[index]


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_streaming_and_webdataset_read_the_same_files(tmp_path: Path, compression: str | None) -> None:
    mds = write_folder(tmp_path / "mds", SOURCES, "mds", compression)
    index = json.loads((mds / "train" / "index.json").read_text())
    readers = [MDSReader.from_json(str(mds), "train", shard) for shard in index["shards"]]
    assert sum(reader.samples for reader in readers) == 80
    for reader in readers:
        stored = reader.zip_data or reader.raw_data
        assert (mds / "train" / stored.basename).stat().st_size == stored.bytes
    if compression is None:
        np.testing.assert_array_equal([row["tokens"] for row in readers[0]], whole("train", {"web": PER_SHARD}))
        tars = write_folder(tmp_path / "tars", SOURCES, "webdataset")
        urls = [str(path) for path in shard_files(tars) if "web/" in str(path)]
        rows = webdataset.WebDataset(urls, shardshuffle=False).decode()
        np.testing.assert_array_equal([row["npy"] for row in rows], whole("train", {"web": 57}))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers_read_the_same(folder: Path, method: str) -> None:
    shards = TokenShards(folder, "train")
    order = GlobalOrder(len(shards), seed=1).sample_ids(0, len(shards)).tolist()
    shards[0]  # a read in the parent must not disturb the workers
    loader = DataLoader(shards, batch_size=4, sampler=order, num_workers=2, multiprocessing_context=method)
    delivered = np.concatenate([batch.numpy() for batch in loader])
    np.testing.assert_array_equal(delivered, whole("train", SOURCES)[order])


def test_the_fingerprint_names_sequences_and_mixture(tmp_path: Path) -> None:
    fingerprints = [
        TokenShards(write_folder(tmp_path / name, sources, "mds", mixture=mixture), split).fingerprint
        for name, sources, mixture, split in (
            ("a", SOURCES, None, "train"),
            ("b", SOURCES, None, "train"),
            ("c", SOURCES, MIXTURE, "train"),
            ("d", {"web": 57, "books": 24}, None, "train"),
        )
    ]
    assert fingerprints[0] == fingerprints[1]
    assert len(set(fingerprints)) == 3


# ---- ranks ----------------------------------------------------------------------------------------------------------


def run_config(folder: Path, *overrides: str) -> RunConfig:
    return load_config("tiny", [*TINY, f"data.path={folder}", "training.steps=30", *overrides])


def global_sequence(config: RunConfig, ranks: int, steps: range, split: str = "train") -> np.ndarray:
    """Tokens that a job of so many ranks reads in these steps, in the order of the global batch: (N, LENGTH)."""
    data = config.data
    samples = training_samples(TokenShards(data.path, split), data.seed, data.shuffle_block_shards)
    of_ranks = [MicroBatches(config, samples, rank, ranks) for rank in range(ranks)]
    found = []
    for step in steps:
        per_step = of_ranks[0].per_step
        for micro_batch in range(step * per_step, (step + 1) * per_step):
            found += [batches[micro_batch].tensors["tokens"].numpy() for batches in of_ranks]
    return np.concatenate(found)


@pytest.mark.parametrize("block", ["null", "2"])
@pytest.mark.parametrize("mixture", [None, MIXTURE], ids=["by_size", "weighted"])
@pytest.mark.parametrize("shard_format", FORMATS)
def test_the_global_sequence_is_the_same_for_any_ranks_and_across_a_resume(
    tmp_path: Path, shard_format: str, mixture: dict | None, block: str
) -> None:
    folder = write_folder(tmp_path / "folder", SOURCES, shard_format, mixture=mixture)
    config = run_config(folder, f"data.shuffle_block_shards={block}", "training.micro_batch_size=2")
    alone = global_sequence(config, 1, range(30))  # 240 samples: three epochs
    for ranks in (2, 4):
        np.testing.assert_array_equal(global_sequence(config, ranks, range(30)), alone)
    # Stopped in the middle of an epoch on two ranks, resumed on four, then on one with other micro-batches.
    other = run_config(folder, f"data.shuffle_block_shards={block}", "training.micro_batch_size=4")
    parts = [(config, 2, range(7)), (config, 4, range(7, 13)), (other, 1, range(13, 30))]
    np.testing.assert_array_equal(np.concatenate([global_sequence(*part) for part in parts]), alone)
    if mixture is None:
        for epoch in alone.reshape(3, 80, LENGTH):
            assert {tuple(row) for row in epoch} == {tuple(row) for row in whole("train", SOURCES)}


def test_formats_are_read_in_the_same_order(tmp_path: Path) -> None:
    found = [
        global_sequence(run_config(write_folder(tmp_path / name, SOURCES, name, mixture=MIXTURE)), 1, range(20))
        for name in FORMATS
    ]
    np.testing.assert_array_equal(*found)


def test_one_source_is_read_in_the_plain_order_of_its_samples(folder: Path, tmp_path: Path) -> None:
    shards = TokenShards(write_folder(tmp_path / "one", {"web": 57}), "train")
    found = [sample.tokens for sample in training_samples(shards, seed=5).read(50, 20)]
    ids = GlobalOrder(57, seed=5).sample_ids(50, 20)
    np.testing.assert_array_equal(found, whole("train", {"web": 57})[ids])


def test_a_weighted_epoch_has_its_proportions(tmp_path: Path) -> None:
    shards = TokenShards(write_folder(tmp_path / "folder", SOURCES, mixture=MIXTURE), "train")
    web = {tuple(row) for row in whole("train", {"web": 57})}
    for epoch in range(3):
        rows = [sample.tokens for sample in training_samples(shards, seed=5).read(80 * epoch, 80)]
        assert sum(tuple(row) in web for row in rows) == 20


def test_a_measurement_takes_of_every_source_by_its_size(tmp_path: Path) -> None:
    held_out = {"web": 30, "books": 10}
    shards = TokenShards(write_folder(tmp_path / "folder", SOURCES, held_out=held_out), "held_out")
    rows = [tuple(sample.tokens) for sample in held_out_samples(shards).read(0, 40)]
    assert set(rows) == {tuple(row) for row in whole("held_out", held_out)}
    assert sum(row in {tuple(row) for row in whole("held_out", {"books": 10})} for row in rows[:12]) == 3
    alone = TokenShards(write_folder(tmp_path / "one", {"web": 57}), "held_out")
    first = [tuple(sample.tokens) for sample in held_out_samples(alone).read(0, 12)]
    assert set(first) == {tuple(row) for row in whole("held_out", {"web": 12})}
