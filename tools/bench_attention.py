"""Attention over the prior's two copies as one product and in chunks, forward and backward, alternating.

    python -m tools.bench_attention                 shapes that a CPU can time
    python -m tools.bench_attention --gpu           those of `paper-2b`, in bfloat16

Predicted: with half of the queries in a chunk about half of all pairs are left, with a quarter three eighths; keys are
copied for it, and small products are less efficient.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from cola_megatron.layers.attention import attend
from cola_megatron.layers.masks import AttentionMask, two_copies_in_chunks, two_copy_mask


class Shape(NamedTuple):
    """Samples, heads, latents, head width, block."""

    batch: int
    heads: int
    length: int
    width: int
    block: int


ON_A_CPU = (Shape(8, 4, 128, 32, 4), Shape(4, 8, 256, 64, 16), Shape(2, 8, 512, 64, 16), Shape(1, 8, 1024, 64, 16))
ON_A_GPU = (Shape(8, 16, 512, 128, 16), Shape(4, 16, 1024, 128, 16), Shape(2, 16, 2048, 128, 16))
SHARES = (2, 4, 8)
"""A chunk is this part of the latents."""


def main(arguments: list[str] | None = None) -> None:
    """Prints milliseconds and the ratio to one product."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="shapes of paper-2b on CUDA, in bfloat16")
    parser.add_argument("--repeats", type=int, default=7, help="of which the median is printed (default 7)")
    chosen = parser.parse_args(arguments)
    for shape in ON_A_GPU if chosen.gpu else ON_A_CPU:
        medians = measure(shape, torch.device("cuda" if chosen.gpu else "cpu"), chosen.repeats)
        whole = medians["whole"]
        each = ", ".join(f"{name} {ms:.2f} ({whole / ms:.2f})" for name, ms in medians.items())
        print(f"{shape.length} latents, {shape.batch} x {shape.heads} heads of {shape.width}: ms {each}", flush=True)


def measure(shape: Shape, device: torch.device, repeats: int) -> dict[str, float]:
    """Median milliseconds of each form; raises AssertionError where a form computes something else."""
    random = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    clean = shape.length - shape.block
    dropped_BN = torch.rand(shape.batch, shape.length // shape.block, device=device, generator=random) < 0.1
    mask = two_copy_mask(shape.length, shape.block, clean, dropped_BN, device)
    forms = {"whole": mask}
    for share in SHARES:
        size = shape.length // share
        forms[f"1/{share}"] = two_copies_in_chunks(mask, shape.length, clean, shape.block, size)
    sizes = (clean + shape.length, shape.batch, shape.heads, shape.width)
    q, k, v = (torch.randn(sizes, device=device, dtype=dtype, generator=random).requires_grad_() for _ in range(3))
    cotangent = torch.randn(*sizes[:2], shape.heads * shape.width, device=device, dtype=dtype, generator=random)

    def both(form: AttentionMask) -> list[torch.Tensor]:
        output = attend(q, k, v, form)
        return [output, *torch.autograd.grad(output, (q, k, v), cotangent)]

    expected = both(mask)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for form in forms.values():
        for ours, theirs in zip(both(form), expected, strict=True):
            assert (ours - theirs).norm() <= tolerance * theirs.norm()
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, form in forms.items():
            seconds[name].append(_timed(lambda form=form: both(form), device))  # type: ignore[misc]
    return {name: 1e3 * statistics.median(taken) for name, taken in seconds.items()}


def _timed(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
