"""What the device can do at most: copies, matrix products and attention at the shapes of the published model.

Each figure of a step stands beside these, measured in the same run.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cola_megatron.layers.masks import two_copy_mask
from tools.gpu_parity import BF16_AMPLIFICATION, BF16_ROUNDING
from tools.gpu_setting import Record, Setting, seconds_of, synchronize

# Rows, input and output width in `paper-2b` at micro-batch 8: the DiT's fused projection and its feed-forward, the
# vocabulary head, and the head as wide as whole tiles.
PRODUCTS = ((8064, 2048, 6144), (8064, 2048, 8192), (8192, 1536, 100278), (8192, 1536, 100352))
SMALL_PRODUCTS = ((64, 32, 64),)

# Queries, keys and values of bfloat16 enter both forms alike. Rounded on the way: the probabilities and the output,
# backward also two score gradients.
ATTENTION_TOLERANCE = BF16_AMPLIFICATION * BF16_ROUNDING * math.sqrt(4)

BACKENDS = {
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "default": None,
}
"""Attention with a mask tensor; FlashAttention takes none."""


def check_copy(setting: Setting) -> Iterator[Record]:
    """Bytes read and written per second in a copy of 2 GiB."""
    source = torch.zeros(2**30 if setting.on_gpu else 2**20, device=setting.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    seconds = seconds_of(setting, lambda: target.copy_(source), 10)
    moved = 2 * source.nbytes
    yield Record("ceilings.copy", True, moved / seconds / 1e9, "GB/s", f"{moved / 1e9:.2f} GB read and written")


def check_products(setting: Setting) -> Iterator[Record]:
    """FLOP/s of a linear layer's three products in bfloat16: forward, gradient of the input, of the weight."""
    for rows, inner, outer in PRODUCTS if setting.on_gpu else SMALL_PRODUCTS:
        yield product(setting, rows, inner, outer)


def product(setting: Setting, rows: int, inner: int, outer: int) -> Record:
    """One shape."""
    x, weight, gradient = (
        torch.randn(shape, device=setting.device, dtype=torch.bfloat16)
        for shape in ((rows, inner), (outer, inner), (rows, outer))
    )
    seconds = [
        seconds_of(setting, work, 10)
        for work in (lambda: x @ weight.t(), lambda: gradient @ weight, lambda: gradient.t() @ x)
    ]
    flops = 2 * rows * inner * outer
    each = ", ".join(f"{flops / took / 1e12:.4g}" for took in seconds)
    detail = f"forward, gradient of the input, of the weight: {each} TFLOP/s"
    return Record(f"ceilings.product.{rows}x{inner}x{outer}", True, 3 * flops / sum(seconds) / 1e12, "TFLOP/s", detail)


def check_attention(setting: Setting) -> Iterator[Record]:
    """Milliseconds of attention with the two-copy mask, forward and backward, and its error against float32.

    Blocks without context as training draws them. Output and gradients are compared by their root mean squares.
    """
    shape = Shape(8, 16, 512, 128, 16) if setting.on_gpu else Shape(2, 2, 64, 16, 16)
    case = TwoCopyAttention(setting, shape)
    for name, backend in BACKENDS.items():
        if backend is not None and not setting.on_gpu:
            continue
        yield case.measured(name, case.masked, backend)
    flex = case.flex()
    yield case.measured("flex", flex) if setting.on_gpu else case.compared_forward("flex", flex)


class Shape:
    """Samples, heads, latents, head width, block."""

    def __init__(self, batch: int, heads: int, length: int, width: int, block: int):
        self.batch, self.heads, self.length, self.width, self.block = batch, heads, length, width, block
        self.clean = length - block
        self.positions = self.clean + length


class TwoCopyAttention:
    """Random queries, keys and values, the mask in both its forms, and what float32 makes of them."""

    def __init__(self, setting: Setting, shape: Shape):
        self.setting, self.shape = setting, shape
        generator = torch.Generator(setting.device).manual_seed(0)
        blocks = shape.length // shape.block
        drawn = torch.rand(shape.batch, blocks, device=setting.device, generator=generator)
        self.dropped_BN = drawn < 0.1
        mask = two_copy_mask(shape.length, shape.block, shape.clean, self.dropped_BN, setting.device)
        assert mask.visible is not None, "of several blocks"
        self.visible_B1SS = mask.visible

        def normal() -> torch.Tensor:
            """(B, A, S, D), with the sequence first in memory, as the model has it."""
            size = (shape.positions, shape.batch, shape.heads, shape.width)
            drawn = torch.randn(size, device=setting.device, dtype=torch.bfloat16, generator=generator)
            return drawn.permute(1, 2, 0, 3)

        self.inputs = tuple(normal().requires_grad_() for _ in range(3))
        self.cotangent = normal()
        wide = tuple(x.detach().float().requires_grad_() for x in self.inputs)
        with sdpa_kernel(SDPBackend.MATH):
            expected = self.masked(*wide)
            gradients = torch.autograd.grad(expected, wide, self.cotangent.float())
        self.expected = dict(zip(("output", "queries", "keys", "values"), (expected.detach(), *gradients), strict=True))

    def masked(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """torch's attention with the mask as a tensor."""
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=self.visible_B1SS)

    def flex(self) -> Callable[..., torch.Tensor]:
        """FlexAttention with the mask as a function, which skips whole tiles; compiled on a GPU."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        shape, device = self.shape, self.setting.device
        positions = torch.arange(shape.length, device=device)
        block = torch.cat((positions[: shape.clean], positions)) // shape.block
        noisy = torch.arange(shape.positions, device=device) >= shape.clean
        dropped_BN = self.dropped_BN

        def visible(sample: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
            context = ~noisy[key] & (block[key] < block[query]) & ~dropped_BN[sample, block[query]]
            own = noisy[key] & (block[key] == block[query])
            return torch.where(noisy[query], context | own, ~noisy[key] & (block[key] <= block[query]))

        mask = create_block_mask(visible, shape.batch, None, shape.positions, shape.positions, device=str(device))
        run: Any = torch.compile(flex_attention, fullgraph=True) if self.setting.on_gpu else flex_attention
        return lambda queries, keys, values: run(queries, keys, values, block_mask=mask)

    def measured(self, name: str, attention: Callable[..., torch.Tensor], backend: SDPBackend | None = None) -> Record:
        """Speed and error, forward and backward."""

        def both() -> tuple[torch.Tensor, ...]:
            output = attention(*self.inputs)
            return output, *torch.autograd.grad(output, self.inputs, self.cotangent)

        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            began = time.perf_counter()
            found = both()
            synchronize(self.setting)
            first = time.perf_counter() - began
            forward = seconds_of(self.setting, lambda: attention(*self.inputs), 10)
            seconds = seconds_of(self.setting, both, 10)
        errors = self.errors(*found)
        detail = f"forward {forward * 1e3:.3g} ms, first call {first * 1e3:.0f} ms; {self._of(errors)}"
        return Record(f"ceilings.attention.{name}", self.passes(errors), seconds * 1e3, "ms", detail)

    def compared_forward(self, name: str, attention: Callable[..., torch.Tensor]) -> Record:
        """The error of the output alone: FlexAttention has no backward pass on a CPU."""
        with torch.no_grad():
            errors = self.errors(attention(*(x.detach() for x in self.inputs)))
        return Record(f"ceilings.attention.{name}", self.passes(errors), None, "ms", self._of(errors))

    def errors(self, *found: torch.Tensor) -> dict[str, float]:
        """Relative root mean square error of the output and of the gradients, as far as they are given."""
        return {
            name: ((tensor.float() - expected).norm() / expected.norm()).item()
            for (name, expected), tensor in zip(self.expected.items(), found, strict=False)
        }

    def passes(self, errors: dict[str, float]) -> bool:
        """Whether all are within the tolerance."""
        return all(error <= ATTENTION_TOLERANCE for error in errors.values())

    def _of(self, errors: dict[str, float]) -> str:
        shape = self.shape
        each = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        return (
            f"{shape.batch} samples, {shape.heads} heads of {shape.width}, {shape.positions} positions; error against "
            f"float32: {each}; tolerance {ATTENTION_TOLERANCE:.1e}"
        )
