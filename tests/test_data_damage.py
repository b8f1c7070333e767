"""Damaged and missing shards: named in an error, or skipped and counted, alike on every rank."""

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cola_megatron.data import BadShardError, ShardError, TokenShards, training_samples
from tests.shard_folders import VOCABULARY, sequence, shard_files, whole, write_folder

SOURCES = {"web": 57, "books": 23}


@pytest.fixture(params=["mds", "webdataset"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A prepared folder of two sources, nine shards."""
    return write_folder(tmp_path / "folder", SOURCES, request.param)


def middle_shard(folder: Path) -> Path:
    """A shard of `web` that is neither its first nor its last."""
    return [path for path in shard_files(folder) if "web/" in str(path)][2]


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 5)


def raise_a_token(path: Path) -> None:
    """Puts a token id behind the vocabulary into one sequence."""
    content = path.read_bytes()
    data = sequence("train", "web", 25).tobytes()
    assert content.count(data) == 1
    path.write_bytes(content.replace(data, data[:-2] + (VOCABULARY + 5).to_bytes(2, "little")))


@pytest.mark.parametrize(
    ("damage", "verify", "what"),
    [
        (flip_byte, "hash", "is damaged: its SHA-256"),
        (truncate, "hash", "bytes, not"),
        (truncate, "size", "bytes, not"),
        (Path.unlink, "size", "is missing"),
    ],
)
def test_a_bad_shard_is_named_at_opening_or_left_out(folder: Path, damage: Callable, verify: str, what: str) -> None:
    shard = middle_shard(folder)
    damage(shard)
    with pytest.raises(ShardError, match=f"{shard} .*{what}.*cola prep verify") as caught:
        TokenShards(folder, "train", verify=verify)
    assert "\n" not in str(caught.value)
    assert len(TokenShards(folder, "held_out")) == 24, "the other split is whole"
    shards = TokenShards(folder, "train", verify=verify, skip_bad=True)
    assert list(shards.bad) == [shard.relative_to(folder / "train").as_posix()]
    assert len(shards) == 80, "every other sample keeps its number"
    with pytest.raises(BadShardError, match=what):
        shards[25]


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
    ("damage", "what"),
    [
        (truncate, r"(has \d+ bytes, not \d+|cannot be read \(IndexError)"),
        (Path.unlink, r"cannot be read \(FileNotFoundError"),
        (raise_a_token, f"holds token id {VOCABULARY + 5}, the vocabulary has {VOCABULARY}"),
    ],
)
def test_a_shard_that_goes_bad_while_training_is_an_error_not_an_end(folder: Path, damage: Callable, what: str) -> None:
    shards = TokenShards(folder, "train")
    shard = middle_shard(folder)
    damage(shard)
    messages = read_errors(shards)
    assert messages
    for message in messages:
        assert re.match(rf"{re.escape(str(shard))}: sample \d+ ({what})", message), message
        assert "\n" not in message


def test_what_is_no_member_of_a_tar_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", SOURCES, "webdataset")
    shards = TokenShards(folder, "train")
    for place, byte in ((0, b"x"), (124, b"7"), (512, b"X")):  # name, size, first byte of the array
        path = shard_files(folder)[0]
        content = bytearray(path.read_bytes())
        content[place : place + 1] = byte
        path.write_bytes(content)
        with pytest.raises(BadShardError, match="sample 0 is "):
            shards[0 if "books" not in str(path) else 57]


@pytest.mark.parametrize("damage", [truncate, Path.unlink, raise_a_token, flip_byte])
@pytest.mark.parametrize("at_opening", [True, False])
def test_skipped_samples_are_replaced_alike_on_every_rank(folder: Path, damage: Callable, at_opening: bool) -> None:
    expected = [sample.tokens for sample in training_samples(TokenShards(folder, "train"), seed=5).read(0, 160)]
    shards = TokenShards(folder, "train", skip_bad=True)
    shard = middle_shard(folder)
    damage(shard)
    if at_opening:
        shards = TokenShards(folder, "train", skip_bad=True)
    samples = training_samples(shards, seed=5, skip_bad=True)
    found = list(samples.read(0, 160))
    ids = samples.order.sample_ids(0, 160)
    web = {tuple(row) for row in whole("train", {"web": 57})}
    bad, replacements = 0, set()
    for number, before, sample in zip(ids, expected, found, strict=True):
        if sample.skipped is None:
            if not (damage is flip_byte and 20 <= number < 30):  # without hashes only impossible values are noticed
                np.testing.assert_array_equal(sample.tokens, before)
            continue
        bad += 1
        assert 20 <= number < 30
        assert sample.skipped[0] == shard.relative_to(folder / "train").as_posix() and str(shard) in sample.skipped[1]
        assert tuple(sample.tokens) in web
        replacements.add(tuple(sample.tokens))
    if damage is Path.unlink or at_opening:
        assert bad == 20
        assert not replacements & {tuple(row) for row in whole("train", {"web": 30})[20:]}
    elif damage is not flip_byte:
        assert 0 < bad < 20
    again = training_samples(pickle.loads(pickle.dumps(shards)), seed=5, skip_bad=True)
    pieces = [sample for start in range(0, 160, 16) for sample in again.read(start, 16)]
    np.testing.assert_array_equal([sample.tokens for sample in pieces], [sample.tokens for sample in found])


def test_when_nothing_is_left_to_read_it_is_an_error(folder: Path) -> None:
    shards = TokenShards(folder, "train", skip_bad=True)
    for path in shard_files(folder):
        if "books" in str(path):
            path.unlink()
    with pytest.raises(ShardError, match=r"all 3 shards of train/books are missing or damaged.*cola prep"):
        TokenShards(folder, "train", skip_bad=True)
    with pytest.raises(ShardError, match=r"100 samples of train/books in a row could not be read.*books/00000/shard"):
        list(training_samples(shards, seed=5, skip_bad=True).read(0, 80))


def test_a_bad_index_or_manifest_is_named(folder: Path) -> None:
    index = folder / "train" / "index.json"
    whole_index = index.read_bytes()
    content = json.loads(whole_index)
    key = "shards" if "shards" in content else "shardlist"
    content[key].pop()
    renamed = json.loads(whole_index.replace(b"shard.00000", b"shard.99999").replace(b"shard-000000", b"shard-999999"))
    for damaged, what in (
        (b"{}", "cannot be read as an index of"),
        (json.dumps(content).encode(), r"lists 7\d sequences, the manifest 80"),
        (json.dumps(renamed).encode(), "which is not in the manifest"),
    ):
        index.write_bytes(damaged)
        with pytest.raises(ShardError, match=r"train/index\.json (has|is damaged)"):
            TokenShards(folder, "train", skip_bad=True)
        with pytest.raises(ShardError, match=f"{index} .*{what}"):
            TokenShards(folder, "train", verify="none")
    index.write_bytes(whole_index)
    with pytest.raises(ShardError, match=r"has no split 'test'; it has train, held_out"):
        TokenShards(folder, "test")
    (folder / "manifest.json").write_text('{"layout_version": 3}')
    with pytest.raises(ShardError, match=r"manifest\.json is no valid manifest \(layout_version") as caught:
        TokenShards(folder, "train")
    assert "\n" not in str(caught.value)
    (folder / "manifest.json").unlink()
    with pytest.raises(ShardError, match=r"manifest\.json does not exist.*cola prep"):
        TokenShards(folder, "train")


def test_shards_of_other_sequences_are_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"sequence_length":32', '"sequence_length":16'))
    with pytest.raises(ShardError, match=r"column_encodings is|is a member of another size"):
        TokenShards(folder, "train", verify="size")[0]


def test_a_split_without_a_sequence_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["held_out"] = {}
    path.write_text(json.dumps(manifest))
    index = folder / "held_out" / "index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content | {key: [] for key, value in content.items() if isinstance(value, list)}))
    with pytest.raises(ShardError, match="held_out holds no sequence"):
        TokenShards(folder, "held_out", verify="none")
