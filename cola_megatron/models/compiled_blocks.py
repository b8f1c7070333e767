"""Transformer layers as compiled kernels: what stands between their matrix products becomes a few passes over memory.

On an H200 the layers of `paper-2b` spend more time in norms, modulation, rotation and residuals, one small kernel after
another, than in attention (docs/performance.md).
"""

import contextlib
import signal
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from cola_megatron.config import RunConfig
from cola_megatron.layers.attention import Attention
from cola_megatron.layers.linear import ColumnLinear, RowLinear
from cola_megatron.layers.norms import ShardedLayerNorm
from cola_megatron.models.dit import DiTBlock
from cola_megatron.models.text_vae import TextBlock
from cola_megatron.models.transformer import TransformerBlock


def compiles(config: RunConfig, device: torch.device) -> bool:
    """Whether a run compiles its layers on this device."""
    wanted = config.training.compile_blocks
    if wanted == "auto":
        return device.type == "cuda" and config.parallel.can_compile_blocks
    return wanted == "always"


def start_compilers(stop_signals: Iterable[signal.Signals]) -> None:
    """Starts the processes in which torch compiles kernels, deaf to signals that ask a run to stop.

    A scheduler sends these to every process of a job. torch's own compilers would end, and the run, which goes on to
    the end of its step to save itself, would wait for their answer for ever.
    """
    from torch._inductor.async_compile import AsyncCompile  # slow to import, and only compiled runs need it

    before = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)  # which the processes inherit
    try:
        AsyncCompile.warm_pool()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def compile_blocks(model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> int:
    """Has every transformer layer compiled at its first call; returns how many there are.

    Layers of a kind share one graph for each shape they meet and for each of forward alone and forward with gradients.
    """
    blocks = [module for module in model.modules() if isinstance(module, TextBlock | DiTBlock | TransformerBlock)]
    for block in blocks:
        _leave_collectives_out(block)
        block.compile(backend=backend, dynamic=False)
    return len(blocks)


def _leave_collectives_out(block: nn.Module) -> None:
    """Under tensor and context parallelism what communicates runs as it is written, between compiled pieces.

    megatron-core's collectives change tensors in place inside their autograd functions, which cannot be traced.
    """
    for module in block.modules():
        if isinstance(module, Attention) and module.groups.context_parallel_size > 1:
            vars(module)["attend_over_ranks"] = torch.compiler.disable(module.attend_over_ranks)
        if isinstance(module, ColumnLinear | RowLinear):
            group: Any = module.tp_group
            communicates = torch.distributed.get_world_size(group) > 1
        else:
            communicates = isinstance(module, ShardedLayerNorm) and module.groups.tensor_parallel_size > 1
        if communicates:
            vars(module)["forward"] = torch.compiler.disable(module.forward)


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Where layers run as they are written: held-out measurements and generation meet shapes by the dozen, and a graph
    for each of them takes seconds to compile."""
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
