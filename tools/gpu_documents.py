"""Attention inside documents: a mask of all pairs beside the kernel of variable lengths that the device has.

Shapes: B samples, S positions, A heads, D head channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from cola_megatron.layers.attention import attend
from cola_megatron.layers.masks import AttentionMask, block_causal_mask
from cola_megatron.layers.packed_documents import installed_kernel, kernel_of_variable_lengths
from tools.gpu_ceilings import ATTENTION_TOLERANCE
from tools.gpu_setting import Record, Setting, seconds_of

# Samples, positions, heads, head width of the autoregressive `paper-2b`; documents of about 300 tokens.
ON_A_GPU, ON_A_CPU = (8, 512, 12, 128), (2, 64, 2, 16)
DOCUMENTS_PER_SAMPLE = 1.7


def check_documents(setting: Setting) -> Iterator[Record]:
    """Milliseconds forward and backward of causal attention inside documents, and the error against float32."""
    batch, length, heads, width = ON_A_GPU if setting.on_gpu else ON_A_CPU
    random = torch.Generator(setting.device).manual_seed(0)
    ends_BS = torch.rand(batch, length, device=setting.device, generator=random) < DOCUMENTS_PER_SAMPLE / length
    documents_BS = ends_BS.cumsum(1)

    def normal() -> torch.Tensor:
        drawn = torch.randn(length, batch, heads, width, device=setting.device, generator=random)
        return drawn.bfloat16().requires_grad_()

    inputs = [normal() for _ in range(3)]
    cotangent_SBH = normal().detach().flatten(2)

    def both(mask: AttentionMask, wide: bool = False) -> list[torch.Tensor]:
        q, k, v = (x.detach().float().requires_grad_() if wide else x for x in inputs)
        output = attend(q, k, v, mask)
        return [output, *torch.autograd.grad(output, (q, k, v), cotangent_SBH.to(output.dtype))]

    masked = block_causal_mask(length, 1, setting.device, documents_BS)
    forms = {"mask": ("torch's products of all pairs", masked)}
    kernel = kernel_of_variable_lengths(setting.device, torch.bfloat16)
    if kernel is not None:
        packed = block_causal_mask(length, 1, setting.device, documents_BS, kernel)
        forms["kernel"] = (f"of {installed_kernel()[0]}", packed)
    expected = both(masked, wide=True)
    for name, (what, mask) in forms.items():
        errors = [
            ((found.float() - wanted).norm() / wanted.norm()).item()
            for found, wanted in zip(both(mask), expected, strict=True)
        ]
        seconds = seconds_of(setting, partial(both, mask), 10)
        detail = (
            f"{what}; {batch} samples of {length} positions, {int(ends_BS.sum()) + batch} documents, {heads} heads of "
            f"{width}; largest error of output and gradients {max(errors):.1e}, tolerance {ATTENTION_TOLERANCE:.1e}"
        )
        yield Record(f"attention.documents.{name}", max(errors) <= ATTENTION_TOLERANCE, seconds * 1e3, "ms", detail)
