"""Weights on disk whatever form they have, and the layouts of other programs that they are read from and written to."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from cola_megatron.config import ModelConfig


class Weights(Protocol):
    """Whole tensors by our names, read one at a time."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor."""

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor: float32, on the CPU."""


class HeldWeights:
    """`Weights` in memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self.tensors = tensors

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor."""
        return self.tensors[name].detach().to("cpu", torch.float32)


class ModelSource(Weights, Protocol):
    """A model on disk, opened: its architecture is known and checked, and its tensors are read one at a time."""

    tokenizer: Path | None

    @property
    def config(self) -> ModelConfig:
        """Its architecture."""

    @property
    def imported(self) -> Mapping[str, Any] | None:
        """What its format keeps of the files that it was read from, so that it is written as it was; None: nothing."""


class WeightFormat(ABC):
    """A layout of another program."""

    name: ClassVar[str]
    """In words, for messages."""

    @abstractmethod
    def matches(self, folder: Path) -> bool:
        """Whether a folder means to be of this layout, and of this family."""

    @abstractmethod
    def open(self, folder: Path) -> ModelSource:
        """Reads it; raises UserError for what is missing, broken or not ours."""

    @abstractmethod
    def write(
        self,
        folder: Path,
        source: ModelSource,
        dtype: torch.dtype | None = None,
        max_shard_bytes: int = 5 * 10**9,
        progress: bool = False,
    ) -> None:
        """Writes it, with its tokenizer, one tensor in memory at a time; raises UserError for what it cannot hold.

        Args:
            dtype: of the written weights; None: as they were where they were read from, else float32.
        """
