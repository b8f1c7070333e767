"""Reading of prepared shards, the order of samples, and the import of streaming."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from cola_megatron.data import GlobalOrder, ShardError, TokenShards
from data_prep.prepare import PrepSettings, prepare

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A prepared folder of a few shards."""
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "épsilon", "zeta"]
    texts = [" ".join(rng.choice(words, 50)) + f" {number}" for number in range(80)]
    source = tmp_path / "corpus.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    settings = PrepSettings(
        inputs=[str(source)],
        output=tmp_path / "prepared",
        sequence_length=32,
        vocab_size=280,
        held_out_fraction=0.2,
        shard_size_bytes=4096,
    )
    return prepare(settings, progress=False)


def middle_shard(folder: Path) -> Path:
    """A shard that is neither the first nor the last."""
    shards = sorted((folder / "train").glob("shard.*.mds"))
    assert len(shards) >= 3
    return shards[1]


def read_all(shards: TokenShards) -> np.ndarray:
    return np.stack([shards[index] for index in range(len(shards))])


def test_sequences_have_their_shape_type_and_range(folder: Path) -> None:
    shards = TokenShards(folder, "train")
    tokens = read_all(shards)
    assert tokens.shape == (len(shards), shards.sequence_length) == (len(shards), 32)
    assert tokens.dtype == np.int64
    assert 0 <= tokens.min() <= tokens.max() < shards.vocab_size == 280
    assert (shards.end_of_text_id, shards.padding_id) == (0, 2)
    assert shards.tokens == tokens.size
    assert shards.tokenizer_path.is_file()
    shards[0][:] = 7  # the array is the caller's own
    assert (shards[0] != 7).any()
    for index in (-1, len(shards)):
        with pytest.raises(IndexError):
            shards[index]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers_read_the_same(folder: Path, method: str) -> None:
    shards = TokenShards(folder, "train")
    order = GlobalOrder(len(shards), seed=1).sample_ids(0, len(shards)).tolist()
    shards[0]  # a read in the parent must not disturb the workers
    loader = DataLoader(shards, batch_size=4, sampler=order, num_workers=2, multiprocessing_context=method)
    delivered = np.concatenate([batch.numpy() for batch in loader])
    np.testing.assert_array_equal(delivered, read_all(shards)[order])


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 0x10
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)


@pytest.mark.parametrize(
    ("damage", "verify", "what"),
    [
        (flip_byte, "hash", "is damaged: its SHA-256"),
        (truncate, "hash", "bytes, not"),
        (truncate, "size", "bytes, not"),
        (Path.unlink, "size", "is missing"),
    ],
)
def test_a_bad_shard_is_named_at_opening(folder: Path, damage: object, verify: str, what: str) -> None:
    shard = middle_shard(folder)
    damage(shard)
    with pytest.raises(ShardError, match=f"{shard} .*{what}.*cola prep verify") as caught:
        TokenShards(folder, "train", verify=verify)
    assert "\n" not in str(caught.value)
    assert len(TokenShards(folder, "held_out")) > 0, "the other split is whole"


def read_errors(shards: TokenShards) -> set[str]:
    """Messages of all reads that fail."""
    messages = set()
    for index in range(len(shards)):
        try:
            shards[index]
        except ShardError as error:
            messages.add(str(error))
    return messages


@pytest.mark.parametrize(
    ("damage", "what"), [(truncate, r"has \d+ bytes, not 64"), (Path.unlink, r"cannot be read \(FileNotFoundError")]
)
def test_a_shard_that_goes_bad_while_training_is_an_error_not_an_end(folder: Path, damage: object, what: str) -> None:
    shards = TokenShards(folder, "train")
    shard = middle_shard(folder)
    damage(shard)
    messages = read_errors(shards)
    assert messages
    for message in messages:
        assert re.match(rf"{re.escape(str(shard))}: sample \d+ ({what})", message)


def test_a_token_outside_the_vocabulary_is_an_error(folder: Path) -> None:
    shard = middle_shard(folder)
    content = shard.read_bytes()
    shard.write_bytes(content[:-2] + (280).to_bytes(2, "little"))
    shards = TokenShards(folder, "train", verify="size")
    assert [message for message in read_errors(shards) if "holds token id 280, the vocabulary has 280" in message]
    batches = iter(DataLoader(shards, batch_size=4, num_workers=1))
    with pytest.raises(ShardError, match="token id 280"):
        for _ in range(len(shards)):
            next(batches)
    batches._shutdown_workers()  # left to the garbage collector, torch waits 5 s for the worker


def test_a_bad_index_or_manifest_is_named(folder: Path) -> None:
    index = folder / "train" / "index.json"
    whole = index.read_bytes()
    content = json.loads(whole)
    content["shards"].pop()
    for damaged, what in ((b"{}", "cannot be read as an MDS index"), (json.dumps(content).encode(), "lists")):
        index.write_bytes(damaged)
        with pytest.raises(ShardError, match=r"train/index\.json has"):
            TokenShards(folder, "train")
        with pytest.raises(ShardError, match=f"{index} {what}"):
            TokenShards(folder, "train", verify="none")
    index.write_bytes(whole)
    with pytest.raises(ShardError, match=r"has no split 'test'; it has train, held_out"):
        TokenShards(folder, "test")
    (folder / "manifest.json").write_text('{"layout_version": 2}')
    with pytest.raises(ShardError, match=r"manifest\.json is no valid manifest \(layout_version") as caught:
        TokenShards(folder, "train")
    assert "\n" not in str(caught.value)
    (folder / "manifest.json").unlink()
    with pytest.raises(ShardError, match=r"manifest\.json does not exist.*cola prep"):
        TokenShards(folder, "train")


def test_a_split_without_a_sequence_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one document only " * 50)
    settings = PrepSettings(
        inputs=[str(tmp_path / "a.txt")],
        output=tmp_path / "out",
        sequence_length=8,
        vocab_size=259,
        held_out_fraction=0,
    )
    with pytest.raises(ShardError, match="held_out holds no sequence"):
        TokenShards(prepare(settings, progress=False), "held_out")


def test_the_order_does_not_depend_on_how_it_is_cut() -> None:
    whole = GlobalOrder(17, seed=5).sample_ids(0, 100)
    for size in (1, 3, 17, 40):
        order = GlobalOrder(17, seed=5)
        pieces = [order.sample_ids(start, min(size, 100 - start)) for start in range(0, 100, size)]
        np.testing.assert_array_equal(np.concatenate(pieces), whole)
    np.testing.assert_array_equal(GlobalOrder(17, seed=5).sample_ids(63, 37), whole[63:])  # resumed
    ranks = np.stack([GlobalOrder(17, seed=5).sample_ids(0, 100)[rank::4] for rank in range(4)], axis=1)
    np.testing.assert_array_equal(ranks.reshape(-1), whole)
    assert whole.dtype == np.int64
    assert len(GlobalOrder(17, seed=5).sample_ids(9, 0)) == 0


@pytest.mark.parametrize("size", [*range(1, 40), 63, 64, 65, 1000, 4095, 4096, 4097, 2**16, 99_991])
def test_every_epoch_holds_every_sample_once(size: int) -> None:
    for epoch in (0, 1, 2**70):
        ids = GlobalOrder(size, seed=4).sample_ids(epoch * size, size)
        np.testing.assert_array_equal(np.sort(ids), np.arange(size))


def test_every_epoch_and_every_seed_has_its_own_order() -> None:
    size = 10_000
    orders = [*GlobalOrder(size, seed=0).sample_ids(0, 3 * size).reshape(3, size)]
    orders += [GlobalOrder(size, seed).sample_ids(0, size) for seed in (1, 2**32, 2**64 - 1)]
    between = np.corrcoef(orders)[np.triu_indices(len(orders), k=1)]
    assert np.abs(between).max() < 4 / np.sqrt(size), "four standard errors of unrelated orders"


@pytest.mark.parametrize("size", [2, 3, 4, 10, 64, 101])
def test_a_sample_may_come_at_any_position_and_after_any_other(size: int) -> None:
    """Chi-square over seeds below its mean plus five standard deviations."""
    seeds = 4000
    orders = np.stack([GlobalOrder(size, seed).sample_ids(0, size) for seed in range(seeds)])
    for counts in (
        np.bincount(np.argmax(orders == 0, axis=1), minlength=size),
        np.bincount(orders[:, 0], minlength=size),
        np.bincount((orders[:, 1] - orders[:, 0]) % size, minlength=size)[1:],
    ):
        expected, freedom = seeds / len(counts), len(counts) - 1
        assert ((counts - expected) ** 2 / expected).sum() <= freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [4096, 50_000])
@pytest.mark.parametrize("seed", range(5))
def test_neighbours_in_the_order_are_unrelated(size: int, seed: int) -> None:
    """Within four standard errors of random permutations."""
    ids = GlobalOrder(size, seed).sample_ids(0, size)
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 4 / np.sqrt(size)
    # The sum of |differences| has the mean (size**2 - 1) / 3 and, to leading order, the variance 2 * size**3 / 45.
    assert abs(np.abs(np.diff(ids)).mean() - (size + 1) / 3) < 4 * np.sqrt(2 * size / 45)


def test_the_order_never_changes_between_releases() -> None:
    """A run resumed with another numpy or another release of this project must go on with the same samples."""
    assert GlobalOrder(10, seed=66).sample_ids(5, 15).tolist() == [8, 9, 6, 4, 5, 5, 7, 4, 9, 3, 1, 8, 2, 6, 0]
    assert GlobalOrder(352_000_000, seed=1).sample_ids(10**6, 4).tolist() == [298011387, 85977106, 114365343, 246937647]
    assert GlobalOrder(2**40, seed=2**64 - 1).sample_ids(3 * 2**40 - 2, 4).tolist() == [
        770252288688,
        4492303722,
        781167706257,
        97161092695,
    ]


@pytest.mark.parametrize("size", [2**40, 2**62 + 1, 2**63])
def test_a_huge_order_takes_no_memory_and_little_to_send(size: int) -> None:
    order = GlobalOrder(size, seed=3)
    start = 2 * size - 500
    expected = order.sample_ids(start, 1000)
    assert 0 <= expected.min() < size // 50
    assert size - size // 50 < expected.max() < size
    assert len(np.unique(expected)) == 1000
    data = pickle.dumps(order)
    assert len(data) < 1000
    tracemalloc.start()
    try:
        received = pickle.loads(data)
        pieces = [received.sample_ids(start + offset, 50) for offset in range(0, 1000, 50)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(np.concatenate(pieces), expected)
    assert peak < 50_000


@pytest.mark.parametrize("arguments", [(0, 1), (-3, 1), (2**63 + 1, 1), (5, -1), (5, 2**64)])
def test_impossible_orders_are_refused(arguments: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"empty|do not fit|seed"):
        GlobalOrder(*arguments)
    with pytest.raises(ValueError, match="negative"):
        GlobalOrder(5, 1).sample_ids(-1, 2)


def run_python(code: str, *extra_paths: Path) -> str:
    paths = os.pathsep.join(map(str, [*extra_paths, ROOT]))
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def make_package(parent: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in path.relative_to(parent).parents[:-1]:
            (parent / folder / "__init__.py").touch()
        path.write_text(content)


def test_a_broken_torchvision_does_not_matter_and_nobody_sees_a_placeholder(tmp_path: Path) -> None:
    make_package(
        tmp_path,
        {
            "torchvision/__init__.py": "import torchvision.early\nraise RuntimeError('torchvision::nms is absent')",
            "torchvision/early.py": "",
            "transformers/__init__.py": "raise ImportError('built for another Python')",
        },
    )
    code = (
        "import sys, importlib\n"
        "from cola_megatron.data.streaming_backend import MDSReader, MDSWriter\n"
        "for name in ('torchvision', 'transformers'):\n"
        "    assert name not in sys.modules\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except (RuntimeError, ImportError) as error:\n"
        "        print(error)\n"
        "print(MDSWriter.__module__)\n"
    )
    lines = run_python(code, tmp_path).splitlines()
    assert lines == [
        "torchvision::nms is absent",
        "built for another Python",
        "streaming.base.format.mds.writer",
    ]


def test_working_packages_are_used_as_they_are(tmp_path: Path) -> None:
    make_package(
        tmp_path,
        {
            "torchvision/datasets.py": "class VisionDataset: pass",
            "torchvision/transforms/functional.py": "to_tensor = None",
            "transformers/feature_extraction_utils.py": "class BatchFeature: pass",
            "transformers/tokenization_utils_base.py": "class BatchEncoding: pass",
            "transformers/models/auto/tokenization_auto.py": "class AutoTokenizer: pass",
        },
    )
    code = (
        "import cola_megatron.data.streaming_backend, streaming.base.dataloader as dataloader, sys\n"
        "print(dataloader.BatchEncoding is sys.modules['transformers.tokenization_utils_base'].BatchEncoding)\n"
        "print(sys.modules['torchvision'].__file__)\n"
    )
    assert run_python(code, tmp_path).splitlines() == ["True", str(tmp_path / "torchvision" / "__init__.py")]
