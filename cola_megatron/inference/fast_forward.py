"""Faster forwards for a network whose weights no longer change.

`prepare` replaces the forward of the linears, of the GELU feed-forward, of the DiT's blocks and of its rotation by ones
that compute the same. The modules, their parameters and the equations stay where they are. What it brings on a CPU:

- Matrices are kept a second time in the order of oneDNN's kernels. For the few rows of a block these are faster than
  the general product, which reorders the matrix in every call. In float32 each row of their result depends on its own
  input row alone, bit for bit, however many rows come along, and so a sample does not depend on its batch. (One row
  by itself would be computed differently; it is computed as two.)
- GELU is applied by the kernel of the matrix product, and a modulation that all positions share by that of the norm.
- The Python of megatron-core's parallel linears is gone; so it is on a GPU.

The prepared forwards know no gradients: where gradients are enabled the original ones run. Matrices that are used once
per run, those of the modulations, are left alone, and so are all under tensor parallelism, where linears communicate.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from cola_megatron.layers.attention import Attention, AttentionContext
from cola_megatron.layers.linear import ColumnLinear, RowLinear
from cola_megatron.layers.mlp import GELUFeedForward
from cola_megatron.layers.norms import LayerNorm
from cola_megatron.layers.rotary import RotaryTable, rotate_interleaved
from cola_megatron.layers.time_embedding import Modulation, TimeEmbedding, TimeRows
from cola_megatron.models.dit import DiTBlock, gated_sum
from cola_megatron.parallel import ProcessGroups


def prepare(network: nn.Module, groups: ProcessGroups) -> None:
    """Makes inference with this network faster, in place; a second time changes nothing."""
    used_once = {
        child
        for module in network.modules()
        if isinstance(module, Modulation | TimeEmbedding)
        for child in module.modules()
    }
    for module in network.modules():
        if isinstance(module, Attention) and module.rotate is rotate_interleaved:
            module.rotate = rotate
        if groups.tensor_parallel_size > 1 or module in used_once or "forward" in vars(module):
            continue
        if isinstance(module, ColumnLinear | RowLinear):
            _replace(module, Product(module.weight, module.bias))
        elif isinstance(module, GELUFeedForward):
            inner, output = Product(module.input.weight, module.input.bias, gelu=True), module.output
            _replace(module, partial(_one_after_the_other, inner, output))
        elif isinstance(module, DiTBlock):
            _replace_block(module)


class Product:
    """x W^T + b, optionally followed by GELU (tanh form), over any leading dimensions."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, gelu: bool = False):
        self.weight, self.bias, self.gelu = weight, bias, gelu
        self._packed: torch.Tensor | None = None
        self._packed_from: tuple[int, int] | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(..., input) -> (..., output), in the weight's type."""
        if torch.compiler.is_compiling():
            return self._general(x)  # the compiler knows no packed matrices
        state = (self.weight.data_ptr(), self.weight._version)
        if self._packed_from != state:  # at the first use, and again should somebody change or move the weight
            self._packed, self._packed_from = _packed(self.weight), state
        if self._packed is None:
            return self._general(x)
        x = x.to(self.weight.dtype)
        if x.numel() == x.shape[-1]:
            return self._multiply(x.reshape(1, -1).expand(2, -1))[:1].view(*x.shape[:-1], -1)
        return self._multiply(x)

    def _general(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x.to(self.weight.dtype), self.weight, self.bias)
        return F.gelu(y, approximate="tanh") if self.gelu else y

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        kind, form = ("gelu", "tanh") if self.gelu else ("none", "")
        return torch.ops.mkldnn._linear_pointwise.default(x, self._packed, self.bias, kind, [], form)


def rotate(x_SBAD: torch.Tensor, table: RotaryTable | torch.Tensor) -> torch.Tensor:
    """`rotate_interleaved` in one multiplication, in place, where the table holds `phases`."""
    if isinstance(table, RotaryTable):
        return rotate_interleaved(x_SBAD, table)
    wide_SBAD = x_SBAD.float()
    pairs = wide_SBAD[..., : 2 * table.shape[-1]].unflatten(-1, (-1, 2))
    torch.view_as_complex(pairs).mul_(table)
    return wide_SBAD.to(x_SBAD.dtype)


def phases(table: RotaryTable | torch.Tensor) -> torch.Tensor:
    """cos + i sin, complex64: a rotation by it is one multiplication. Phases stay what they are."""
    if not isinstance(table, RotaryTable):
        return table
    return torch.complex(table.cos, table.sin)


def _replace(module: nn.Module, prepared: Callable[[torch.Tensor], torch.Tensor]) -> None:
    original = type(module).forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        return original(module, x) if torch.is_grad_enabled() else prepared(x)

    vars(module)["forward"] = forward


def _replace_block(block: DiTBlock) -> None:
    original = type(block).forward

    def forward(
        x_SBH: torch.Tensor,
        silu_time_T1H: torch.Tensor,
        index: TimeRows | None,
        context: AttentionContext,
        tables: tuple[torch.Tensor, ...] | None = None,
    ) -> torch.Tensor:
        if torch.is_grad_enabled() or tables is None or index is not None:
            return original(block, x_SBH, silu_time_T1H, index, context, tables)
        attention_shift_scale, attention_gate, ffn_shift_scale, ffn_gate = tables
        branch = block.attention(_modulated_norm(block.attention_norm, x_SBH, attention_shift_scale), context)
        x_SBH = gated_sum(x_SBH, attention_gate, branch)
        return gated_sum(x_SBH, ffn_gate, block.ffn(_modulated_norm(block.ffn_norm, x_SBH, ffn_shift_scale)))

    vars(block)["forward"] = forward


def _modulated_norm(norm: LayerNorm, x_SBH: torch.Tensor, shift_scale_1H: torch.Tensor) -> torch.Tensor:
    """norm(x) (1 + scale) + shift in one kernel: the modulation of all positions is weight and bias of their norm."""
    shift, scale = shift_scale_1H[0].chunk(2)
    return F.layer_norm(x_SBH, (norm.size,), 1 + scale, shift, norm.eps)


def _one_after_the_other(
    first: Callable[[torch.Tensor], torch.Tensor], second: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    return second(first(x))


def _packed(weight: torch.Tensor) -> torch.Tensor | None:
    """The matrix in the order of oneDNN's kernel; None where there is no such kernel.

    The two operations are what torch.compile emits for linears of frozen models on a CPU; torch does not document them.
    """
    if weight.device.type != "cpu" or not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return None
    if not all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")):
        return None
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach())
