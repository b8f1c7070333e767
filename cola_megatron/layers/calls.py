"""What calling a layer takes and returns: of `nn.Module` a type checker knows only that it can be called."""

from typing import Protocol

import torch


class OnTensor(Protocol):
    """A layer from one tensor to one."""

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor: ...
