"""sum += gradient for all parameters of a model at once: bfloat16 gradients of a micro-batch into float32 sums.

For a parameter 2 bytes are read, 4 read and 4 written, which takes 5 ms for 2.2e9 parameters on an H200; as one call of
torch for each of 579 tensors it took 10, and kept the host from preparing the next micro-batch.
"""

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

ELEMENTS_PER_PROGRAM = 4096


class GradientSums:
    """Adds to fixed sums, on the device where these lie."""

    def __init__(self, sums: Sequence[torch.Tensor]):
        self.sums = list(sums)
        self._plan: tuple[tuple[int, ...], torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def add(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Adds a gradient to each of the sums; None adds nothing.

        Raises:
            ValueError: another number of gradients than of sums, or of elements in one of them.
        """
        pairs = [
            (total, gradient) for total, gradient in zip(self.sums, gradients, strict=True) if gradient is not None
        ]
        if any(total.numel() != gradient.numel() for total, gradient in pairs):
            raise ValueError("a gradient has another number of elements than its sum")
        if not pairs:
            return
        if pairs[0][0].is_cuda and _kernel() is not None:
            self.add_in_one_launch(pairs)
            return
        for total, gradient in pairs:
            total.add_(gradient.view_as(total))

    def add_in_one_launch(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """The kernel, whose programs each add a piece of one tensor; `pairs` are (sum, gradient)."""
        device = pairs[0][0].device
        gradients = [gradient.contiguous() for _, gradient in pairs]  # as they are, except for a transposed one
        sizes = tuple(total.numel() for total, _ in pairs)
        addresses = torch.tensor(
            [[tensor.data_ptr() for tensor in gradients], [total.data_ptr() for total, _ in pairs]], dtype=torch.int64
        )
        if device.type == "cuda":
            # From pinned memory nothing waits for the device; the allocator keeps it until the copy is made.
            addresses = addresses.pin_memory().to(device, non_blocking=True)
        if self._plan is None or self._plan[0] != sizes:
            self._plan = (sizes, *_pieces(sizes, device))
        _, size_of_tensor, pieces = self._plan
        kernel: Any = _kernel()
        kernel[(pieces.shape[1],)](
            addresses[0], addresses[1], size_of_tensor, pieces[0], pieces[1], ELEMENTS=ELEMENTS_PER_PROGRAM
        )


def _pieces(sizes: Sequence[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Size of each tensor; and of each program its tensor and its first element there, (2, programs)."""
    starts = [torch.arange(0, size, ELEMENTS_PER_PROGRAM) for size in sizes]
    tensors = [torch.full_like(start, index) for index, start in enumerate(starts)]
    return torch.tensor(sizes, device=device), torch.stack((torch.cat(tensors), torch.cat(starts))).to(device)


@cache
def _kernel() -> Any:
    """None where there is no Triton, as in a torch for CPUs."""
    if importlib.util.find_spec("triton") is None:
        return None
    from cola_megatron.parallel.gradient_sums_kernel import add_pieces

    return add_pieces
