"""safetensors files, written one tensor after another."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""The types that weights come in, by their names in the files."""


class PlannedTensor(NamedTuple):
    """A tensor of a file to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.dtype.itemsize * math.prod(self.shape)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes tensors that are in host memory."""
    planned = [PlannedTensor(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    stream_tensors(path, planned, tensors.__getitem__)


def stream_tensors(path: Path, planned: Sequence[PlannedTensor], read: Callable[[str], torch.Tensor]) -> None:
    """Writes a file tensor by tensor: the library's own writer wants all of them in memory.

    Args:
        read: called once per name, in the order of the file; what it returns is on the CPU.

    Raises:
        ValueError: `read` returned another type or shape than planned.
    """
    ordered = sorted(planned, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))  # so that all are aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        offsets = [end, end + tensor.size]
        header[tensor.name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        end += tensor.size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, dtype, shape in ordered:
            values = read(name)
            if values.dtype != dtype or tuple(values.shape) != shape:
                raise ValueError(f"{name} is {values.dtype} {tuple(values.shape)}, planned was {dtype} {shape}")
            file.write(values.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
