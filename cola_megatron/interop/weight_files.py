"""The weights of one published network: `model.safetensors`, or an index and the shards that it names.

The index is Hugging Face's: `{"metadata": {"total_size": bytes}, "weight_map": {tensor: file}}`.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from cola_megatron.checkpoint.tensor_files import TYPES, PlannedTensor, stream_tensors
from cola_megatron.interop.errors import PublishedError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
"""Hugging Face's default."""

_DTYPES = {name: dtype for dtype, name in TYPES.items()}
_OWN_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


class StoredWeight(NamedTuple):
    """Where a tensor lies and what it is."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightFiles:
    """The tensors of a folder: known at once, read one by one.

    Raises:
        PublishedError: no weights, or two sets of them; a damaged file; an index and shards that contradict each other.
    """

    def __init__(self, folder: Path):
        self.tensors: dict[str, StoredWeight] = {}
        if (folder / INDEX).is_file():
            self.source = folder / INDEX
            if (folder / WEIGHTS).exists():
                raise PublishedError(f"{folder} has both {WEIGHTS} and {INDEX}; delete the one that is out of date")
            self._open_shards(_read_weight_map(self.source))
        else:
            self.source = folder / WEIGHTS
            if not self.source.exists():
                raise PublishedError(f"{self.source}: no such file, and no {INDEX}; fetch the weights again")
            self.tensors = dict(_contents(self.source))

    def read(self, name: str) -> torch.Tensor:
        """One tensor, of the type it is stored in.

        The file is mapped anew each time: a mapping that is kept counts every page that was ever read through it.
        """
        stored = self.tensors[name]
        with _readable(stored.file), safe_open(stored.file, "pt") as file:
            return file.get_tensor(name)

    def _open_shards(self, weight_map: dict[str, str]) -> None:
        folder, shards = self.source.parent, sorted(set(weight_map.values()))
        absent = [shard for shard in shards if not (folder / shard).is_file()]
        if absent:
            raise PublishedError(f"{self.source} names files that are missing: {', '.join(absent)}; fetch them")
        for shard in shards:
            for name, stored in _contents(folder / shard):
                if name in self.tensors:
                    raise PublishedError(
                        f"{self.source}: {name} is in two shards, {self.tensors[name].file.name} and {shard}; "
                        "fetch shards and index again, together"
                    )
                self.tensors[name] = stored
        wrong = [
            f"{name} is not in {shard}" for name, shard in sorted(weight_map.items()) if not self._is_in(name, shard)
        ]
        wrong += [f"{name} is not in the index" for name in sorted(self.tensors.keys() - weight_map.keys())]
        if wrong:
            raise PublishedError(f"{self.source}: {', '.join(wrong)}; fetch shards and index again, together")

    def _is_in(self, name: str, shard: str) -> bool:
        return name in self.tensors and self.tensors[name].file.name == shard


def write_weights(
    folder: Path,
    planned: Sequence[PlannedTensor],
    read: Callable[[str], torch.Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes one file, or shards of at most `max_shard_bytes` (a larger tensor is a shard of its own) and an index.

    Tensors are read and written one by one. Weights that are in `folder` already stay until the new ones are complete.
    """
    shards = _cut(planned, max_shard_bytes)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [WEIGHTS]
    for leftover in folder.glob(".writing_*"):  # of a process that was killed
        leftover.unlink()
    unfinished = {name: folder / f".writing_{name}" for name in names}
    try:
        for shard, path in zip(shards, unfinished.values(), strict=True):
            stream_tensors(path, shard, read)
        if len(shards) > 1:
            unfinished[INDEX] = folder / f".writing_{INDEX}"
            index = {
                "metadata": {"total_size": sum(tensor.size for tensor in planned)},
                "weight_map": {
                    tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard
                },
            }
            unfinished[INDEX].write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    except BaseException:
        for path in unfinished.values():
            path.unlink(missing_ok=True)
        raise
    for path in folder.iterdir():
        if _OWN_FILES.fullmatch(path.name):
            path.unlink()
    for name, path in unfinished.items():
        path.rename(folder / name)


def _cut(planned: Sequence[PlannedTensor], max_bytes: int) -> list[list[PlannedTensor]]:
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in planned:
        if shards[-1] and size + tensor.size > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size
    return shards


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text()).get("weight_map")
    except (ValueError, AttributeError) as error:
        raise PublishedError(f"{index}: not a valid index ({error}); fetch it again") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise PublishedError(f"{index}: no weight_map of tensors and files; fetch it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise PublishedError(f"{index}: {name} lies in {file!r}, which is no file beside it; fetch it again")
    return weight_map


def _contents(path: Path) -> Iterator[tuple[str, StoredWeight]]:
    with _readable(path), safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no dictionary)
            view = file.get_slice(name)
            if view.get_dtype() not in _DTYPES:
                raise PublishedError(f"{path}: {name} is of type {view.get_dtype()}; weights are {', '.join(_DTYPES)}")
            yield name, StoredWeight(path, _DTYPES[view.get_dtype()], tuple(view.get_shape()))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise PublishedError(f"{path}: not a readable safetensors file ({error}); fetch it again") from None
