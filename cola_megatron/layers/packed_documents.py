"""Attention inside documents that lie end to end: a kernel that visits only their pairs.

A mask over whole sequences computes every pair and needs a number for each; flash attention of variable lengths takes
where documents start instead. It comes from flash-attn, or from torch, which has it for CUDA alone.

Shapes: B samples, S positions of each, T = B * S positions in a row, N documents, A query heads, G heads of keys and
values, D head channels.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, bool], torch.Tensor]
"""q (T, A, D), k and v (T, G, D), `starts_N` and `longest` of `PackedDocuments`, and whether no position sees a later
one -> (T, A, D)."""


class PackedDocuments(NamedTuple):
    """Where documents start in the row of all samples, one behind the other, and what computes their attention."""

    starts_N: torch.Tensor
    """int32 (N + 1,), ascending from 0 to T; what is behind the last document is empty documents."""
    longest: int
    """No document is longer."""
    kernel: Kernel


def kernel_of_variable_lengths(device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """The one for tensors of this kind; None: there is none, as on a CPU and in float32."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return None
    # Both are for Ampere and later.
    return installed_kernel()[1] if torch.cuda.get_device_capability(device) >= (8, 0) else None


def pack_documents(documents_BS: torch.Tensor, kernel: Kernel) -> PackedDocuments:
    """The documents of (B, S) numbers: neighbours of one sample with equal numbers are of one document.

    How many there are decides the shape of the answer, so the host waits for the device.
    """
    batch, length = documents_BS.shape
    first_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    first_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    starts = first_BS.flatten().nonzero().flatten().int()
    # Few different shapes: the layers are compiled for each of them.
    slots = 1 << (len(starts) - 1).bit_length()
    starts_N = torch.full((slots + 1,), batch * length, dtype=torch.int32, device=starts.device)
    starts_N[: len(starts)] = starts
    return PackedDocuments(starts_N, length, kernel)


def starts_of(lengths: Sequence[int]) -> torch.Tensor:
    """`PackedDocuments.starts_N` of documents of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def attend_inside_documents(
    q_SBAD: torch.Tensor, k_SBGD: torch.Tensor, v_SBGD: torch.Tensor, documents: PackedDocuments, causal: bool
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v over the keys of the query's own document; (S, B, A, D) -> (S, B, A * D)."""
    length, batch = q_SBAD.shape[:2]
    q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (q_SBAD, k_SBGD, v_SBGD))
    out_TAD: torch.Tensor = documents.kernel(q, k, v, documents.starts_N, documents.longest, causal)
    out_BSAD: torch.Tensor = out_TAD.unflatten(0, (batch, length))
    return out_BSAD.transpose(0, 1).flatten(2)


@cache
def installed_kernel() -> tuple[str, Kernel]:
    """The package that it comes from, and the kernel; which device can run it is another question."""
    if find_spec("flash_attn") is not None:
        return "flash-attn", _of_flash_attn()
    return "torch", _of_torch()


def _of_flash_attn() -> Kernel:
    library: Any = importlib.import_module("flash_attn")

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int, causal: bool
    ) -> torch.Tensor:
        out: torch.Tensor = library.flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, causal=causal)
        return out

    return run


def _of_torch() -> Kernel:
    # The names of its options differ between the versions of torch that we take.
    attention: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    options = inspect.signature(attention).parameters

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int, causal: bool
    ) -> torch.Tensor:
        chosen: dict[str, Any] = {}
        if causal:
            chosen = {"window_size": (-1, 0)} if "window_size" in options else {"is_causal": True}
        shared_by = q.shape[1] // k.shape[1]
        if shared_by > 1 and "enable_gqa" in options:
            chosen["enable_gqa"] = True
        elif shared_by > 1:
            k, v = (x.repeat_interleave(shared_by, dim=1) for x in (k, v))
        out: torch.Tensor = attention(q, k, v, starts, starts, longest, longest, **chosen)
        return out

    return run
