"""Weight gradients of linear layers straight into their float32 sums: total += gradient^T x.

The product of a bfloat16 layer is computed in float32 and rounded to bfloat16, to be read again and added to the sum.
NVIDIA apex's `fused_weight_gradient_mlp_cuda` adds it to the sum where it is computed: 4 bytes of memory traffic less
for each parameter and micro-batch, no bfloat16 gradient in memory, and no rounding of it.

megatron-core's linears call that extension themselves (`gradient_accumulation_fusion`), but set attributes of a weight
in their backward pass, which no compiler takes into a graph. So `WeightGradientIntoSum` calls it where layers are
compiled, through an operator that a compiler sees from outside; under tensor parallelism, where layers that communicate
are not compiled, megatron-core does.
"""

import importlib
import importlib.util
from typing import Any

import torch

from cola_megatron.config import ConfigError, RunConfig

EXTENSION = "fused_weight_gradient_mlp_cuda"


def is_available() -> bool:
    """Whether apex was built with the extension."""
    return importlib.util.find_spec(EXTENSION) is not None


def fuses_weight_gradients(config: RunConfig, device: torch.device) -> bool:
    """Whether a run adds weight gradients straight to their sums on this device.

    Raises:
        ConfigError: it must, and the extension is not there.
    """
    wanted = config.training.fused_weight_gradients
    if wanted == "always" and not is_available():
        raise ConfigError(
            f"training.fused_weight_gradients=always needs NVIDIA apex with {EXTENSION}, which is not installed: build "
            "it (docs/install.md), or use auto"
        )
    if wanted == "auto":
        return device.type == "cuda" and config.can_fuse_weight_gradients and is_available()
    return wanted == "always"


def _add(x_NI: torch.Tensor, gradient_NO: torch.Tensor, total_OI: torch.Tensor) -> None:
    # `.data` counts its changes by itself: a layer that ran twice has saved the sum twice for its backward passes, and
    # autograd would refuse the second for the change that the first made.
    importlib.import_module(EXTENSION).wgrad_gemm_accum_fp32(x_NI, gradient_NO, total_OI.data)


# A library and not `torch.library.custom_op`, which takes several times as long for each call on the host.
_LIBRARY = torch.library.Library("cola_megatron", "DEF")
_LIBRARY.define("add_weight_gradient(Tensor x, Tensor gradient, Tensor(a!) total) -> ()")
_LIBRARY.impl("add_weight_gradient", _add, "CompositeExplicitAutograd")
torch.library.register_fake("cola_megatron::add_weight_gradient", lambda x, gradient, total: None, lib=_LIBRARY)


class WeightGradientIntoSum(torch.autograd.Function):
    """x W^T + b whose weight has no gradient: the backward pass adds it to `total_OI`, which is float32."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, total_OI: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight_OI, total_OI)
        ctx.has_bias = bias_O is not None
        output = torch.matmul(x, weight_OI.t())  # as megatron-core has it, so that the two agree bit for bit
        return output if bias_O is None else output + bias_O

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, weight_OI, total_OI = ctx.saved_tensors
        gradient_NO = gradients[0].contiguous().flatten(0, -2)
        of_x = gradients[0].matmul(weight_OI) if ctx.needs_input_grad[0] else None
        torch.ops.cola_megatron.add_weight_gradient(x.contiguous().flatten(0, -2), gradient_NO, total_OI)
        return of_x, None, gradient_NO.sum(0) if ctx.has_bias else None, None
