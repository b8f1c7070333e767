"""Tensors in pieces: cut by one, written, found damaged, and read by another who cuts them otherwise."""

import itertools

import numpy as np
import pytest
import torch

from cola_megatron.checkpoint import sharded_tensors
from cola_megatron.checkpoint.errors import CheckpointError
from cola_megatron.checkpoint.sharded_tensors import Piece, StoredTensors, rectangles, write_index, write_pieces


def test_large_tensors_are_cut_into_pieces_and_files(tmp_path, monkeypatch):
    monkeypatch.setattr(sharded_tensors, "PIECE_BYTES", 4 * 70)
    monkeypatch.setattr(sharded_tensors, "FILE_BYTES", 4 * 200)
    tall, deep = torch.randn(30, 10), torch.randn(1, 40, 9)
    pieces = [Piece("tall", (30, 10), (0, 0), tall), Piece("deep", (1, 40, 9), (0, 0, 0), deep)]
    write_index(tmp_path, write_pieces(tmp_path, "one", pieces))
    assert max(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < 4 * 300 + 1000
    assert len(list(tmp_path.glob("*.safetensors"))) >= 3
    stored = StoredTensors(tmp_path)
    assert torch.equal(stored.read("tall"), tall) and torch.equal(stored.read("deep"), deep)
    assert torch.equal(stored.read("deep", ((0, 5, 2), (1, 20, 3))), deep[:, 5:25, 2:5])


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (1, 6), (4, 1, 3), (2, 3, 4, 2)])
def test_rectangles_cover_every_range_once(shape):
    places = np.arange(int(np.prod(shape))).reshape(shape)
    for start, stop in itertools.combinations(range(places.size + 1), 2):
        boxes = list(rectangles(shape, start, stop))
        parts = [
            places[tuple(slice(first, first + size) for first, size in zip(*box, strict=True))].ravel() for box in boxes
        ]
        assert np.array_equal(np.concatenate(parts), np.arange(start, stop))  # once, in order, contiguous
        assert all(part.size == np.prod(sizes) for part, (_, sizes) in zip(parts, boxes, strict=True))
        assert len(boxes) <= max(1, 2 * len(shape) - 1)


def cut_at_random(name: str, whole: torch.Tensor, random: np.random.Generator) -> list[Piece]:
    """All of a tensor as the pieces of a few writers, each with a range of the flattened tensor."""
    ends = sorted({0, whole.numel(), *random.integers(0, whole.numel() + 1, 4).tolist()})
    return [
        Piece(name, tuple(whole.shape), offsets, whole[tuple(map(slice, offsets, np.add(offsets, sizes)))])
        for start, stop in itertools.pairwise(ends)
        for offsets, sizes in rectangles(tuple(whole.shape), start, stop)
    ]


def test_what_one_cut_wrote_another_reads(tmp_path):
    random = np.random.default_rng(0)
    for number in range(30):
        whole = torch.from_numpy(random.normal(size=random.integers(1, 7, random.integers(0, 5)))).float()
        folder = tmp_path / str(number)
        folder.mkdir()
        halves = [cut_at_random(name, whole, random) for name in ("a", "b")]
        written = [
            piece for part, pieces in enumerate(halves) for piece in write_pieces(folder, f"rank_{part}", pieces)
        ]
        write_index(folder, written)
        found = torch.full_like(whole, torch.nan)
        wanted = [
            piece._replace(values=found[tuple(map(slice, piece.offsets, np.add(piece.offsets, piece.values.shape)))])
            for piece in cut_at_random("a", whole, random)
        ]
        StoredTensors(folder).fill(wanted)
        assert torch.equal(found, whole)


def test_pieces_that_do_not_make_a_tensor_are_refused(tmp_path):
    piece = Piece("a", (4, 3), (0, 0), torch.zeros(2, 3))
    with pytest.raises(CheckpointError, match=r"pieces of a have 6 elements for \[4, 3\]"):
        write_index(tmp_path, write_pieces(tmp_path, "one", [piece]))


@pytest.mark.parametrize("damage", ["missing", "short", "index", "no index"])
def test_damaged_files_are_named(tmp_path, damage):
    write_index(tmp_path, write_pieces(tmp_path, "one", [Piece("a", (4, 3), (0, 0), torch.ones(4, 3))]))
    file, index = tmp_path / "one_000.safetensors", tmp_path / "index.json"
    if damage == "missing":
        file.unlink()
    elif damage == "short":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "index":
        index.write_text(index.read_text()[:-9])
    else:
        index.unlink()
    with pytest.raises(CheckpointError, match="is missing or damaged") as refusal:
        StoredTensors(tmp_path).read("a")
    assert str(index if "index" in damage else file) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_tensor_of_another_model_is_refused(tmp_path):
    write_index(tmp_path, write_pieces(tmp_path, "one", [Piece("a", (4, 3), (0, 0), torch.ones(4, 3))]))
    stored = StoredTensors(tmp_path)
    with pytest.raises(CheckpointError, match="holds no b"):
        stored.fill([Piece("b", (4, 3), (0, 0), torch.ones(4, 3))])
    with pytest.raises(CheckpointError, match=r"a has shape \(4, 3\), the model needs \(3, 4\)"):
        stored.fill([Piece("a", (3, 4), (0, 0), torch.ones(3, 4))])
