"""Multi-head attention in the two forms of the model; the product itself is one function."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from cola_megatron.layers.linear import ColumnLinear, RowLinear
from cola_megatron.layers.masks import AttentionMask
from cola_megatron.layers.norms import LayerNorm, ShardedLayerNorm
from cola_megatron.layers.rotary import RotaryTable
from cola_megatron.parallel import ProcessGroups
from cola_megatron.parallel.parameters import Initializer

Norm = LayerNorm | ShardedLayerNorm


class KeyValueStore(Protocol):
    """Attention through a cache: it takes the new queries, keys and values, and knows what each query may see."""

    def attend(
        self, layer: nn.Module, q_SBAD: torch.Tensor, k_SBAD: torch.Tensor, v_SBAD: torch.Tensor
    ) -> torch.Tensor:
        """(S, B, A, D) -> (S, B, A * D), as `attend` below."""


@dataclass(frozen=True)
class AttentionContext:
    """Where the queries stand and what they see; the same for every layer of a stack. A cache has its own mask."""

    rotary: RotaryTable | torch.Tensor
    """What `rotate` of the layers takes: a table, or the phases that `inference.fast_forward` makes of it."""
    mask: AttentionMask
    cache: KeyValueStore | None = None


class InContext(Protocol):
    """A layer whose positions see each other."""

    def __call__(self, x_SBH: torch.Tensor, context: AttentionContext, /) -> torch.Tensor: ...


def attend(q_SBAD: torch.Tensor, k_KBAD: torch.Tensor, v_KBAD: torch.Tensor, mask: AttentionMask) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v over the visible keys; (S, B, A, D) -> (S, B, A * D)."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBAD, k_KBAD, v_KBAD))
    if mask.chunks:
        out = torch.cat(
            [
                product(q[:, :, chunk.queries], _joined(k, chunk.keys), _joined(v, chunk.keys), chunk.visible)
                for chunk in mask.chunks
            ],
            dim=2,
        )
    else:
        out = product(q, k, v, mask.visible, mask.causal)
    return out.permute(2, 0, 1, 3).flatten(2)


def _joined(x_BAKD: torch.Tensor, parts: tuple[slice, ...]) -> torch.Tensor:
    pieces = [x_BAKD[:, :, part] for part in parts]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def product(
    q_BASD: torch.Tensor,
    k_BAKD: torch.Tensor,
    v_BAKD: torch.Tensor,
    visible: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v over the visible keys, (B, A, S, D), by the fastest kernel that torch has for it."""
    if not q_BASD.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q_BASD, k_BAKD, v_BAKD, attn_mask=visible, is_causal=causal)
    # cuDNN makes a plan for every new shape, which takes up to half a second: in training there are few shapes and
    # many calls, in inference a new width for every block of every prompt.
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        return F.scaled_dot_product_attention(q_BASD, k_BAKD, v_BAKD, attn_mask=visible, is_causal=causal)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(allowed)


def allow_cudnn_in_training(lengths: Iterable[int]) -> None:
    """Keeps cuDNN's kernel away from sequence lengths at which its gradients are wrong, for the whole process.

    With a mask, a length of 64 modulo 128 and a log-sum-exp below -88.7 it gives queries a gradient that is not a
    number (pytorch issue 196678, seen with cuDNN 9.15 and later).
    """
    if any(length % 128 == 64 for length in lengths):
        torch.backends.cuda.enable_cudnn_sdp(False)


class Attention(nn.Module):
    """Projections, query/key norm, rotary, product, output projection.

    Args:
        norm_whole_width: the query/key norm spans all heads (Text VAE); otherwise one head (DiT).
        rotate: how channels are paired.
    """

    __call__: InContext

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        *,
        groups: ProcessGroups,
        qkv_bias: bool,
        output_bias: bool,
        norm_eps: float | None,
        norm_affine: bool = True,
        norm_whole_width: bool,
        rotate: Callable[[torch.Tensor, Any], torch.Tensor],
        initializer: Initializer,
    ):
        super().__init__()
        self.head_dim, self.rotate, self.norm_whole_width = head_dim, rotate, norm_whole_width
        width = num_heads * head_dim
        self.qkv = ColumnLinear(hidden_size, 3 * width, groups=groups, bias=qkv_bias, initializer=initializer)
        self.output = RowLinear(width, hidden_size, groups=groups, bias=output_bias, initializer=initializer)
        self.query_norm = self.key_norm = None
        if norm_eps is not None:

            def norm() -> Norm:
                if norm_whole_width:
                    return ShardedLayerNorm(width, norm_eps, groups=groups, affine=norm_affine)
                # Whole on every rank, but each rank norms its own heads only.
                several_ranks = groups.tensor_parallel_size > 1
                return LayerNorm(head_dim, norm_eps, groups=groups, affine=norm_affine, partial_gradient=several_ranks)

            self.query_norm, self.key_norm = norm(), norm()

    def forward(self, x_SBH: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """(S, B, H) -> (S, B, H)."""
        qkv = self.qkv(x_SBH)
        q, k, v = qkv.unflatten(-1, (-1, 3, self.head_dim)).unbind(-2)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self._normed(self.query_norm, q), self._normed(self.key_norm, k)
        q, k = self.rotate(q, context.rotary), self.rotate(k, context.rotary)
        if context.cache is not None:
            return self.output(context.cache.attend(self, q, k, v))
        return self.output(attend(q, k, v, context.mask))

    def _normed(self, norm: Norm, x_SBAD: torch.Tensor) -> torch.Tensor:
        return norm(x_SBAD.flatten(2)).view(x_SBAD.shape) if self.norm_whole_width else norm(x_SBAD)
