"""Shards behind URLs and compressed ones: the bounded cache that they go through, and what can go wrong on the way.

A file:// URL stands for an object store: everything but the transport is the same.
"""

import contextlib
import functools
import http.server
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from cola_megatron.data import BadShardError, ShardError, TokenShards, cache, tokenizer_file, training_samples, transfer
from cola_megatron.data.cache import ENTRY, ShardCache
from tests.shard_folders import read, shard_files, whole, write_folder

SOURCES = {"web": 157, "books": 43}  # 16 + 5 shards
FORMATS = ["mds", "webdataset"]
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses, and a default cache folder of the test's own."""
    monkeypatch.setattr(transfer, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(cache, "POLL_SECONDS", 0.002)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture(params=FORMATS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_folder(tmp_path / "store", SOURCES, request.param)


def four_shards(folder: Path) -> int:
    """The smallest limit that a folder takes."""
    return 4 * max(path.stat().st_size for path in shard_files(folder))


def remote(folder: Path, **options) -> TokenShards:
    return TokenShards(f"file://{folder}", "train", cache_folder=folder.parent / "cache", **options)


def cached(folder: Path) -> list[Path]:
    """Shards in the cache beside a folder, and parts of them."""
    return [path for path in (folder.parent / "cache").iterdir() if ENTRY.fullmatch(path.name)]


def size_of(paths: list[Path]) -> int:
    total = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


# ---- whole ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("shard_format", FORMATS)
def test_remote_shards_read_like_local_ones(tmp_path: Path, shard_format: str, compression: str | None) -> None:
    folder = write_folder(tmp_path / "store", SOURCES, shard_format, compression)
    local, far = TokenShards(folder, "train"), remote(folder)
    assert far.fingerprint == local.fingerprint and len(far) == 200
    assert far.tokenizer_path.read_bytes() == local.tokenizer_path.read_bytes()
    assert tokenizer_file(f"file://{folder}").read_bytes() == b"{}"
    for shards in (local, far, pickle.loads(pickle.dumps(far))):
        np.testing.assert_array_equal(read(shards, 200), whole("train", SOURCES))
    assert len(cached(folder)) == 21
    sequences = [[sample.tokens for sample in training_samples(shards, 3, 2).read(0, 250)] for shards in (local, far)]
    np.testing.assert_array_equal(*sequences)


def test_the_default_cache_is_below_the_temporary_folder(folder: Path, tmp_path: Path) -> None:
    shards = TokenShards(f"file://{folder}", "train")
    shards[0]
    place = tmp_path / f"cola_megatron-{os.getuid()}"
    assert [path for path in place.iterdir() if ENTRY.fullmatch(path.name)]
    assert place.stat().st_mode & 0o077 == 0


def test_over_http(folder: Path) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads http with aiohttp")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        shards = TokenShards(url, "train", cache_folder=folder.parent / "cache")
        np.testing.assert_array_equal(read(shards, 60), whole("train", SOURCES)[:60])
        loader = DataLoader(shards, batch_size=4, num_workers=2, sampler=range(100, 200))
        np.testing.assert_array_equal(
            np.concatenate([batch.numpy() for batch in loader]), whole("train", SOURCES)[100:]
        )
        shard_files(folder)[12].unlink()  # in `web`, and not read so far
        with pytest.raises(BadShardError, match=rf"{url}/train/web/.* is missing"):
            read(shards, 100)
    finally:
        server.shutdown()


# ---- the limit ------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_shards_go_first(folder: Path) -> None:
    shards = remote(folder, cache_bytes=four_shards(folder))
    for index in (0, 10, 20, 30, 0, 40):
        shards[index]
        time.sleep(0.01)
    shards.folder.place += "-gone"
    for index in (0, 20, 30, 40):
        shards[index]
    with pytest.raises(BadShardError, match="is missing"):
        shards[10]


def test_a_limit_below_four_shards_is_refused(folder: Path) -> None:
    needed = four_shards(folder)
    with pytest.raises(ShardError, match=f"cache_bytes={needed - 1} holds fewer than 4 shards .* at least {needed}"):
        remote(folder, cache_bytes=needed - 1)
    TokenShards(folder, "train", cache_bytes=1)  # what is local and not compressed needs no cache


def read_at_random(shards: TokenShards, seed: int) -> None:
    expected = whole("train", SOURCES)
    for index in np.random.default_rng(seed).integers(0, len(shards), 150):
        np.testing.assert_array_equal(shards[int(index)], expected[index])


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("shard_format", FORMATS)
def test_many_processes_stay_within_the_limit(tmp_path: Path, shard_format: str, compression: str | None) -> None:
    limit = four_shards(write_folder(tmp_path / "plain", SOURCES, shard_format)) + 100
    folder = write_folder(tmp_path / "store", SOURCES, shard_format, compression)
    shards = remote(folder, cache_bytes=limit)
    readers = [FORK.Process(target=read_at_random, args=(shards, seed)) for seed in range(6)]
    for reader in readers:
        reader.start()
    largest = 0
    while any(reader.is_alive() for reader in readers):
        # Under the lock of the cache no file comes, goes or grows beyond the size that it has claimed.
        with cache._locked(folder.parent / "cache" / cache.LOCK):
            largest = max(largest, size_of(cached(folder)))
    assert [reader.exitcode for reader in readers] == [0] * 6
    assert 0 < largest <= limit
    assert not [path for path in cached(folder) if path.suffix]


def test_an_order_in_blocks_fetches_each_shard_once_in_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []
    copy = transfer.copy_verified
    monkeypatch.setattr(
        "cola_megatron.data.folder.copy_verified", lambda source, *rest: (fetched.append(source), copy(source, *rest))
    )
    folder = write_folder(tmp_path / "store", {"web": 200})
    shards = remote(folder, cache_bytes=four_shards(folder))
    fetched.clear()
    list(training_samples(shards, seed=3, block_shards=2).read(0, 200))
    assert len(fetched) == len(set(fetched)) == 20


# ---- damage ---------------------------------------------------------------------------------------------------------


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 3)


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize(
    ("damage", "what"), [(flip_byte, "is damaged: its SHA-256"), (truncate, "bytes, not"), (Path.unlink, "is missing")]
)
def test_a_bad_remote_shard_is_named_or_skipped(
    tmp_path: Path, damage: Callable, what: str, compression: str | None
) -> None:
    folder = write_folder(tmp_path / "store", SOURCES, "mds", compression)
    damage([path for path in shard_files(folder) if "web/" in str(path)][3])
    shards = remote(folder)
    with pytest.raises(BadShardError, match=rf"file://{folder}/train/web/00000/shard.00003.mds.*{what}") as caught:
        shards[35]
    assert "\n" not in str(caught.value) and "upload the file anew" in str(caught.value)
    assert not [path for path in cached(folder) if path.suffix]
    found = list(training_samples(remote(folder, skip_bad=True), seed=3, skip_bad=True).read(0, 200))
    assert sum(sample.skipped is not None for sample in found) == 10
    again = list(training_samples(remote(folder, skip_bad=True), seed=3, skip_bad=True).read(100, 100))
    np.testing.assert_array_equal([sample.tokens for sample in found[100:]], [sample.tokens for sample in again])


class Flaky:
    """Opens files like fsspec, but fails the first times."""

    def __init__(self, failures: int, error: Exception) -> None:
        self.left, self.error, self.open = failures, error, transfer.fsspec.open

    def __call__(self, source: str, mode: str):
        if self.left:
            self.left -= 1
            raise self.error
        return self.open(source, mode)


@pytest.mark.parametrize(
    "error", [ConnectionResetError("reset by peer"), TimeoutError(), RuntimeError("503 slow down")]
)
def test_a_passing_failure_is_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    shards = remote(folder)
    monkeypatch.setattr(transfer.fsspec, "open", Flaky(4, error))
    np.testing.assert_array_equal(shards[0], whole("train", SOURCES)[0])
    monkeypatch.setattr(transfer.fsspec, "open", Flaky(5, error))
    with pytest.raises(
        ShardError, match=rf"file://{folder}/train/.* cannot be read after 5 attempts .*run again"
    ) as caught:
        shards[100]
    assert not isinstance(caught.value, BadShardError), "what only cannot be reached is not skipped"
    np.testing.assert_array_equal(shards[100], whole("train", SOURCES)[100])


def test_what_no_second_attempt_can_cure_is_said_at_once(folder: Path, tmp_path: Path) -> None:
    for place, what in (
        (f"file://{tmp_path}/nowhere", r"nowhere/manifest\.json is missing: not a finished prepared folder"),
        ("nonsense://bucket/corpus", r"nonsense://bucket/corpus/manifest\.json cannot be opened: .*nonsense"),
    ):
        with pytest.raises(ShardError, match=what) as caught:
            TokenShards(place, "train")
        assert "\n" not in str(caught.value)
        assert tokenizer_file(place) is None
    (folder / "tokenizer.json").write_text("{ }")
    with pytest.raises(ShardError, match=r"tokenizer\.json has more than the 2 bytes"):
        remote(folder).folder.small_file("tokenizer.json")
    (tmp_path / "file").touch()
    with pytest.raises(ShardError, match=r"file/cache cannot hold copies of shards .*data\.cache_folder"):
        TokenShards(f"file://{folder}", "train", cache_folder=tmp_path / "file" / "cache")


# ---- processes that die ---------------------------------------------------------------------------------------------


class Stuck:
    """Delivers a part of each shard, then nothing more."""

    def __init__(self) -> None:
        self.open = transfer.fsspec.open

    @contextlib.contextmanager
    def __call__(self, source: str, mode: str) -> Iterator["Stuck"]:
        with self.open(source, mode) as self.file:
            yield self

    def read(self, size: int) -> bytes:
        data = self.file.read(100)
        if self.file.tell() > 200:
            time.sleep(60)
        return data


def fetch_and_get_stuck(shards: TokenShards, index: int) -> None:
    transfer.fsspec.open = Stuck()
    shards[index]


@pytest.fixture
def stuck(folder: Path) -> Iterator[tuple[TokenShards, FORK.Process]]:
    """A process in the middle of fetching the shard of sequence 0."""
    shards = remote(folder, cache_bytes=four_shards(folder))
    process = FORK.Process(target=fetch_and_get_stuck, args=(shards, 0))
    process.start()
    until = time.monotonic() + 10
    while size_of([path for path in cached(folder) if path.suffix]) == 0 and time.monotonic() < until:
        time.sleep(0.01)
    yield shards, process
    process.kill()
    process.join()


def test_a_killed_process_leaves_nothing_harmful(folder: Path, stuck: tuple) -> None:
    shards, process = stuck
    (part,) = cached(folder)
    assert part.suffix and part.stat().st_size > 200, "it claims its whole size from the start"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    began = time.monotonic()
    np.testing.assert_array_equal(read(shards, 200), whole("train", SOURCES))
    assert time.monotonic() - began < 5, "its locks went with it"
    assert not [path for path in cached(folder) if path.suffix]


def test_the_part_of_a_killed_process_makes_room_for_another_shard(folder: Path, stuck: tuple) -> None:
    shards, process = stuck
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    shards[100]
    assert len(cached(folder)) == 1


def test_a_process_that_hangs_is_waited_for_so_long_and_named(
    folder: Path, stuck: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, _ = stuck
    for index in (50, 60, 70, 80):  # others go on beside it
        shards[index]
    monkeypatch.setattr(cache, "STALLED_SECONDS", 0.3)
    with pytest.raises(ShardError, match=r"[0-9a-f]{64}\.part is locked by a process that makes no progress"):
        shards[0]


def test_a_cache_without_room_says_so(folder: Path, stuck: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "STALLED_SECONDS", 0.3)
    (part,) = cached(folder)
    small = ShardCache(part.parent, part.stat().st_size + 10)
    with pytest.raises(ShardError, match=r"has no room for 11 bytes under data.cache_bytes"):
        small.path("0" * 64, 11, lambda file: None)


def test_a_full_disk_is_named_with_its_cure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = remote(folder)
    monkeypatch.setattr(transfer.fsspec, "open", Flaky(99, OSError(28, "No space left on device")))
    with pytest.raises(ShardError, match=r"the disk is full while .*data\.cache_folder"):
        shards[0]


def test_other_files_in_the_cache_folder_are_left_alone(folder: Path) -> None:
    shards = remote(folder, cache_bytes=four_shards(folder))
    note = folder.parent / "cache" / "note.txt"
    note.write_text("mine " * 10_000)
    read(shards, 200)
    assert note.is_file()
