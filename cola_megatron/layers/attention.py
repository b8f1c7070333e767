"""Multi-head attention in the forms of the models; the product itself is one function.

Shape suffixes beyond those of the package: G heads of keys and values on this rank, each shared by A / G query heads
next to each other (grouped-query attention; G = A otherwise).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from cola_megatron.layers.linear import ColumnLinear, RowLinear
from cola_megatron.layers.masks import AttentionMask
from cola_megatron.layers.norms import LayerNorm, ShardedLayerNorm
from cola_megatron.layers.packed_documents import attend_inside_documents
from cola_megatron.layers.roles import Roles
from cola_megatron.layers.rotary import RotaryTable
from cola_megatron.parallel import ProcessGroups
from cola_megatron.parallel.parameters import Initializer
from cola_megatron.parallel.sequence_parts import heads_for_positions, positions_for_heads

Norm = LayerNorm | ShardedLayerNorm


class KeyValueStore(Protocol):
    """Attention through a cache: it takes the new queries, keys and values, and knows what each query may see."""

    def attend(
        self, layer: nn.Module, q_SBAD: torch.Tensor, k_SBGD: torch.Tensor, v_SBGD: torch.Tensor
    ) -> torch.Tensor:
        """(S, B, A, D) -> (S, B, A * D), as `attend` below."""


@dataclass(frozen=True)
class AttentionContext:
    """Where the queries stand and what they see; the same for every layer of a stack. A cache has its own mask.

    Under context parallelism the queries are of this rank's part of the sequence; the mask is that of whole sequences.
    """

    rotary: RotaryTable | torch.Tensor
    """What `rotate` of the layers takes: a table, or the phases that `inference.fast_forward` makes of it."""
    mask: AttentionMask
    cache: KeyValueStore | None = None


class InContext(Protocol):
    """A layer whose positions see each other."""

    def __call__(self, x_SBH: torch.Tensor, context: AttentionContext, /) -> torch.Tensor: ...


def attend(q_SBAD: torch.Tensor, k_KBGD: torch.Tensor, v_KBGD: torch.Tensor, mask: AttentionMask) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v over the visible keys; (S, B, A, D) -> (S, B, A * D)."""
    if mask.documents is not None:
        return attend_inside_documents(q_SBAD, k_KBGD, v_KBGD, mask.documents, mask.causal)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBAD, k_KBGD, v_KBGD))
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


def _joined(x_BGKD: torch.Tensor, parts: tuple[slice, ...]) -> torch.Tensor:
    pieces = [x_BGKD[:, :, part] for part in parts]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def product(
    q_BASD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKD: torch.Tensor,
    visible: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v over the visible keys, (B, A, S, D), by the fastest kernel that torch has for it."""
    shared_by = q_BASD.shape[1] // k_BGKD.shape[1]
    if shared_by == 1:
        return _product(q_BASD, k_BGKD, v_BGKD, visible, causal)
    if causal:
        # Only flash attention reads a head once for all of its queries; with the other kernels torch would fall back
        # to a product that holds all pairs.
        if q_BASD.is_cuda and q_BASD.dtype != torch.float32:
            return _product(q_BASD, k_BGKD, v_BGKD, causal=True, enable_gqa=True)
        k_BASD, v_BASD = (x.repeat_interleave(shared_by, dim=1) for x in (k_BGKD, v_BGKD))
        return _product(q_BASD, k_BASD, v_BASD, causal=True)
    # The queries of a shared head one behind the other, as if they were further positions: nothing is copied for them.
    q_BGSD = q_BASD.unflatten(1, (-1, shared_by)).flatten(2, 3)
    if visible is not None:
        visible = visible.repeat(*(1,) * (visible.dim() - 2), shared_by, 1)
    out_BGQSD: torch.Tensor = _product(q_BGSD, k_BGKD, v_BGKD, visible).unflatten(2, (shared_by, -1))
    return out_BGQSD.flatten(1, 2)


def _product(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor | None = None,
    causal: bool = False,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if not q.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal, enable_gqa=enable_gqa)
    # cuDNN makes a plan for every new shape, which takes up to half a second: in training there are few shapes and
    # many calls, in inference a new width for every block of every prompt.
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal, enable_gqa=enable_gqa)
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

    Rows of the fused projection are stored as (heads of keys and values, {queries, key, value}, channels); see
    `layers/linear.py`.

    Args:
        num_key_value_heads: heads of keys and values, each shared by as many query heads; None: as many as of queries.
        norm_whole_width: the query/key norm spans all heads (Text VAE); otherwise one head (DiT).
        rotate: how channels are paired.
        ends_branch: the output projection ends the branch of the residual stream; False: a gate behind it does.
    """

    __call__: InContext

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        *,
        num_key_value_heads: int | None = None,
        groups: ProcessGroups,
        qkv_bias: bool,
        output_bias: bool,
        norm_eps: float | None,
        norm_affine: bool = True,
        norm_whole_width: bool,
        rotate: Callable[[torch.Tensor, Any], torch.Tensor],
        initializer: Initializer,
        roles: Roles,
        ends_branch: bool = True,
    ):
        super().__init__()
        self.head_dim, self.rotate, self.norm_whole_width = head_dim, rotate, norm_whole_width
        self.groups = groups
        key_value_heads = num_heads if num_key_value_heads is None else num_key_value_heads
        self.shared_by = num_heads // key_value_heads
        width, key_value_width = num_heads * head_dim, key_value_heads * head_dim
        self.qkv = ColumnLinear(
            hidden_size,
            width + 2 * key_value_width,
            groups=groups,
            bias=qkv_bias,
            initializer=initializer,
            role=roles.in_branch,
            fused_rows=(self.shared_by * head_dim, head_dim, head_dim),
        )
        self.output = RowLinear(
            width,
            hidden_size,
            groups=groups,
            bias=output_bias,
            initializer=initializer,
            role=roles.last_of_branch(ends_branch),
        )
        self.query_norm = self.key_norm = None
        if norm_eps is not None:

            def norm(width: int) -> Norm:
                if norm_whole_width:
                    return ShardedLayerNorm(
                        width, norm_eps, groups=groups, role=roles.vector_in_branch, affine=norm_affine
                    )
                # Whole on every rank, but each rank norms its own heads only.
                several_ranks = groups.tensor_parallel_size > 1
                return LayerNorm(
                    head_dim,
                    norm_eps,
                    groups=groups,
                    role=roles.vector_in_branch,
                    affine=norm_affine,
                    partial_gradient=several_ranks,
                )

            self.query_norm, self.key_norm = norm(width), norm(key_value_width)

    def forward(self, x_SBH: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """(S, B, H) -> (S, B, H)."""
        qkv = self.qkv(x_SBH)
        queries = self.shared_by
        q, k, v = qkv.unflatten(-1, (-1, queries + 2, self.head_dim)).split((queries, 1, 1), dim=-2)
        q, k, v = q.flatten(-3, -2), k.squeeze(-2), v.squeeze(-2)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self._normed(self.query_norm, q), self._normed(self.key_norm, k)
        q, k = self.rotate(q, context.rotary), self.rotate(k, context.rotary)
        if context.cache is not None:
            return self.output(context.cache.attend(self, q, k, v))
        if self.groups.context_parallel_size > 1:
            return self.output(self.attend_over_ranks(q, k, v, context.mask))
        return self.output(attend(q, k, v, context.mask))

    def attend_over_ranks(
        self, q_sBAD: torch.Tensor, k_sBGD: torch.Tensor, v_sBGD: torch.Tensor, mask: AttentionMask
    ) -> torch.Tensor:
        """`attend` where every context-parallel rank has a part of the positions: (s, B, A, D) -> (s, B, A * D).

        Each rank attends for its share of the heads. Heads of keys and values that are fewer than ranks are repeated.
        """
        shared = k_sBGD.shape[2]
        repeats = max(1, self.groups.context_parallel_size // shared)
        queries = q_sBAD.shape[2] // (shared * repeats)
        q = q_sBAD.unflatten(2, (-1, queries))
        k, v = (x.repeat_interleave(repeats, dim=2)[:, :, :, None] for x in (k_sBGD, v_sBGD))
        exchanged = heads_for_positions(torch.cat((q, k, v), dim=3), self.groups)
        q, k, v = exchanged.split((queries, 1, 1), dim=3)
        out_SBH = attend(q.flatten(2, 3), k.squeeze(3), v.squeeze(3), mask)
        return positions_for_heads(out_SBH, self.groups)

    def _normed(self, norm: Norm, x_SBAD: torch.Tensor) -> torch.Tensor:
        return norm(x_SBAD.flatten(2)).view(x_SBAD.shape) if self.norm_whole_width else norm(x_SBAD)
