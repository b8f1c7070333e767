"""Gradients of a micro-batch are added to their float32 sums, all at once."""

import os
import subprocess
import sys

import pytest
import torch

from cola_megatron.parallel.gradient_sums import ELEMENTS_PER_PROGRAM, GradientSums

SHAPES = [(ELEMENTS_PER_PROGRAM + 1, 3), (7,), (ELEMENTS_PER_PROGRAM,), (1,), (128, 65)]


def drawn() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    random = torch.Generator().manual_seed(0)
    sums = [torch.randn(shape, generator=random) for shape in SHAPES]
    gradients = [torch.randn(shape, generator=random).bfloat16() for shape in SHAPES]
    gradients[0] = gradients[0].t().contiguous().t()  # as some layers leave it
    return sums, gradients


def test_sums_are_those_of_float32():
    sums, gradients = drawn()
    expected = [total + gradient for total, gradient in zip(sums, gradients, strict=True)]
    expected[1] = sums[1].clone()
    GradientSums(sums).add([gradients[0], None, *gradients[2:]])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(sums, expected, strict=True))


def test_a_gradient_of_another_size_is_refused():
    sums, gradients = drawn()
    with pytest.raises(ValueError, match="another number of elements"):
        GradientSums(sums).add([gradients[1], *gradients[1:]])


def test_the_kernel_adds_the_same():
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA")
    # Triton decides at import whether it interprets: in a process of its own.
    code = "from tests.test_gradient_sums import compare_kernel; compare_kernel()"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1"}, check=True, timeout=120)


def compare_kernel() -> None:
    """The kernel in Triton's interpreter against torch, twice: the second time with the plan of the first."""
    sums, gradients = drawn()
    expected = [total + 2 * gradient.float() for total, gradient in zip(sums, gradients, strict=True)]
    adder = GradientSums(sums)
    for _ in range(2):
        adder.add_in_one_launch(list(zip(sums, gradients, strict=True)))
    assert all((ours - theirs).abs().max() < 1e-6 for ours, theirs in zip(sums, expected, strict=True))
