"""Whole tensors in many files: every process writes the rectangles it holds, and any process reads any rectangle.

    tensors/
        index.json                    for each tensor its shape, and each piece of it: file, offsets, shape, CRC-32
        rank_00003_000.safetensors    pieces under the key `name@offsets`

Nothing in it depends on how the writers or the readers cut the tensors.
"""

import json
import math
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch
from safetensors import SafetensorError, safe_open

from cola_megatron.checkpoint.errors import CheckpointError, DamagedCheckpoint
from cola_megatron.checkpoint.tensor_files import write_tensors
from cola_megatron.records.on_disk import flush

INDEX = "index.json"
PIECE_BYTES = 16 * 2**20
"""Larger rectangles are stored in several pieces: a reader reads and checks whole pieces."""
FILE_BYTES = 256 * 2**20
"""A writer begins another file beyond this: what one file holds is in host memory at once."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and shape of a rectangle."""


class Piece(NamedTuple):
    """A rectangle of a whole tensor, and where its values are: to be written from there, or read to there."""

    name: str
    whole: tuple[int, ...]
    """Shape of the whole tensor."""
    offsets: tuple[int, ...]
    values: torch.Tensor
    """Of the rectangle's shape; a view of what is saved or loaded."""


class StoredPiece(TypedDict):
    """What the index says of a piece."""

    file: str
    offsets: list[int]
    shape: list[int]
    crc32: int


class StoredTensor(TypedDict):
    """What the index says of a tensor."""

    shape: list[int]
    pieces: list[StoredPiece]


class Written(NamedTuple):
    """A piece that was written, of which tensor of what shape."""

    name: str
    whole: tuple[int, ...]
    piece: StoredPiece


def rectangles(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The elements start .. stop of a flattened array as rectangles of the array, at most 2 n - 1 for n dimensions.

    They come in order, and each is contiguous in the flattened array.
    """
    if start >= stop:
        return
    if len(shape) < 2:
        yield (start,) * len(shape), (stop - start,) * len(shape)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows

    def part_of_row(index: int, begin: int, end: int) -> Iterator[Box]:
        yield from (((index, *offsets), (1, *sizes)) for offsets, sizes in rectangles(shape[1:], begin, end))

    if start < first * row:
        yield from part_of_row(first - 1, start - (first - 1) * row, min(row, stop - (first - 1) * row))
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if first <= last and last * row < stop:
        yield from part_of_row(last, 0, stop - last * row)


def cut(piece: Piece) -> Iterator[Piece]:
    """The piece in parts of about PIECE_BYTES, along its first dimension that has several rows."""
    shape = piece.values.shape
    dim = next((dim for dim, size in enumerate(shape) if size > 1), None)
    if dim is None:
        yield piece
        return
    row_bytes = 4 * piece.values.numel() // shape[dim]
    step = max(1, PIECE_BYTES // row_bytes)
    for start in range(0, shape[dim], step):
        values = piece.values.narrow(dim, start, min(step, shape[dim] - start))
        offsets = (*piece.offsets[:dim], piece.offsets[dim] + start, *piece.offsets[dim + 1 :])
        yield piece._replace(offsets=offsets, values=values)


def write_pieces(folder: Path, stem: str, pieces: Iterable[Piece]) -> list[Written]:
    """Writes one process's pieces as float32 into files `stem`_000.safetensors, ... in `folder`, and to the disk.

    `pieces` is consumed as it is written, so a generator needs memory for one file only.

    Returns:
        what `write_index` needs to know of each piece.
    """
    written: list[Written] = []
    batch: dict[str, torch.Tensor] = {}
    size, files = 0, 0

    def finish_file() -> None:
        nonlocal size, files
        write_tensors(folder / _file(stem, files), batch)
        flush(folder / _file(stem, files))
        batch.clear()
        size, files = 0, files + 1

    for piece in chain.from_iterable(map(cut, pieces)):
        values = piece.values.detach().to("cpu", torch.float32).contiguous()
        batch[_key(piece.name, piece.offsets)] = values
        size += values.nbytes
        shape, offsets = list(values.shape), list(piece.offsets)
        entry = StoredPiece(file=_file(stem, files), offsets=offsets, shape=shape, crc32=_checksum(values))
        written.append(Written(piece.name, tuple(piece.whole), entry))
        if size >= FILE_BYTES:
            finish_file()
    if batch:
        finish_file()
    return written


def write_index(folder: Path, written: Iterable[Written]) -> None:
    """Completes `folder` with the index of what all processes wrote, and returns when it is on the disk.

    Raises:
        CheckpointError: the pieces of a tensor do not add up to it.
    """
    index: dict[str, StoredTensor] = {}
    for name, whole, piece in written:
        tensor = index.setdefault(name, StoredTensor(shape=list(whole), pieces=[]))
        if tensor["shape"] != list(whole):
            raise CheckpointError(f"{folder}: {name} is of shape {tensor['shape']} here and {list(whole)} there")
        tensor["pieces"].append(piece)
    for name, tensor in index.items():
        size = sum(math.prod(piece["shape"]) for piece in tensor["pieces"])
        if size != math.prod(tensor["shape"]):
            raise CheckpointError(f"{folder}: the pieces of {name} have {size} elements for {tensor['shape']}")
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(index[name])}" for name in sorted(index))
    (folder / INDEX).write_text(f"{{\n{lines}\n}}\n")
    flush(folder / INDEX)
    flush(folder)


class StoredTensors:
    """A folder of tensors, for reading. Every method raises DamagedCheckpoint where files are missing or damaged.

    Args:
        index_crc32: of the index file, where it is known.
    """

    def __init__(self, folder: Path, index_crc32: int | None = None):
        self.folder = folder
        self._open: dict[str, safe_open] = {}
        try:
            content = (folder / INDEX).read_bytes()
            self._index: dict[str, StoredTensor] = json.loads(content)
        except (OSError, ValueError) as error:
            raise self._damaged(INDEX, error) from error
        if index_crc32 is not None and zlib.crc32(content) != index_crc32:
            raise self._damaged(INDEX, "it is not what was written")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor."""
        return {name: tuple(entry["shape"]) for name, entry in self._index.items()}

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """A rectangle of a tensor, by default all of it: float32, on the CPU."""
        shape = self.shapes[name]
        offsets, sizes = box if box is not None else ((0,) * len(shape), shape)
        values = torch.empty(sizes)
        self.fill([Piece(name, shape, offsets, values)])
        return values

    def verify(self, reader: int = 0, readers: int = 1) -> None:
        """Reads one of `readers` even shares of all pieces, file by file, and compares it with its checksums."""
        pieces = [(name, stored) for name, tensor in self._index.items() for stored in tensor["pieces"]]
        pieces.sort(key=lambda piece: piece[1]["file"])
        start, stop = (len(pieces) * end // readers for end in (reader, reader + 1))
        for _, of_one_file in groupby(pieces[start:stop], key=lambda piece: piece[1]["file"]):
            self._open.clear()  # what was read through a mapping counts as memory while it is kept
            for name, stored in of_one_file:
                self._read(name, stored)
        self._open.clear()

    @torch.no_grad()
    def fill(self, pieces: Iterable[Piece]) -> None:
        """Reads each piece into its `values`, which may be of another type and on a device.

        Raises:
            CheckpointError: also where a tensor is unknown or of another shape.
        """
        for name, wanted in groupby(sorted(pieces, key=lambda piece: piece.name), key=lambda piece: piece.name):
            self._fill(name, list(wanted))

    def _fill(self, name: str, wanted: list[Piece]) -> None:
        if name not in self._index:
            raise CheckpointError(f"{self.folder} holds no {name}: it is of another model")
        shape = self.shapes[name]
        if any(tuple(piece.whole) != shape for piece in wanted):
            raise CheckpointError(f"{self.folder}: {name} has shape {shape}, the model needs {tuple(wanted[0].whole)}")
        missing = sum(piece.values.numel() for piece in wanted)
        for stored in self._index[name]["pieces"]:
            box = tuple(stored["offsets"]), tuple(stored["shape"])
            in_both = [(piece, _overlap(box, (piece.offsets, tuple(piece.values.shape)))) for piece in wanted]
            overlaps = [(piece, overlap) for piece, overlap in in_both if overlap is not None]
            if not overlaps:
                continue
            values = self._read(name, stored)
            for piece, (in_stored, in_piece) in overlaps:
                target = piece.values[in_piece]
                target.copy_(values[in_stored])
                missing -= target.numel()
        if missing:
            raise self._damaged(INDEX, f"{name} is incomplete")

    def _read(self, name: str, stored: StoredPiece) -> torch.Tensor:
        file = stored["file"]
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.folder / file, "pt")  # mapped; it keeps no file open
            values = self._open[file].get_tensor(_key(name, stored["offsets"]))
        except (OSError, SafetensorError) as error:
            raise self._damaged(file, error) from error
        if list(values.shape) != stored["shape"] or _checksum(values) != stored["crc32"]:
            raise self._damaged(file, f"{name} is not what was written")
        return values

    def _damaged(self, file: str, reason: object) -> DamagedCheckpoint:
        return DamagedCheckpoint(f"{self.folder / file} is missing or damaged ({' '.join(str(reason).split())})")


def _file(stem: str, number: int) -> str:
    return f"{stem}_{number:03d}.safetensors"


def _key(name: str, offsets: Iterable[int]) -> str:
    return f"{name}@{','.join(map(str, offsets))}"


def _checksum(values: torch.Tensor) -> int:
    return zlib.crc32(values.view(-1).numpy().data.cast("B"))


def _overlap(stored: Box, wanted: Box) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """What two rectangles have in common: as slices of the one and of the other."""
    of_stored, of_wanted = [], []
    for stored_start, stored_size, start, size in zip(*stored, *wanted, strict=True):
        begin, end = max(stored_start, start), min(stored_start + stored_size, start + size)
        if begin >= end:
            return None
        of_stored.append(slice(begin - stored_start, end - stored_start))
        of_wanted.append(slice(begin - start, end - start))
    return tuple(of_stored), tuple(of_wanted)
