"""From logits to the estimate of the embeddings: x_hat = sum_v softmax(l)_v e_v, over a vocabulary cut over ranks.

The logits are those of the network plus the output prior, (alpha / sigma^2) <z_t, e_v>: what z_t itself says of the
token. Both as published.

Shapes: S positions, B batch, C channels of an embedding, V vocabulary on this rank. All in float32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from cola_megatron.parallel import ProcessGroups
from cola_megatron.parallel.megatron import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)


class Prediction(NamedTuple):
    """What the network says of every position, alike on every tensor-parallel rank."""

    estimate_SBC: torch.Tensor
    """x_hat."""
    nll_SB: torch.Tensor
    """-log softmax(l)[token], nats."""


def embeddings_of(tokens_BL: torch.Tensor, embeddings_VC: torch.Tensor, groups: ProcessGroups) -> torch.Tensor:
    """Embeddings of token ids of the whole vocabulary, (B, L) -> (L, B, C)."""
    local_SB, held_SB = _local(tokens_BL.t(), len(embeddings_VC), groups)
    x_SBC = torch.nn.functional.embedding(local_SB, embeddings_VC) * held_SB[..., None]
    return reduce_from_tensor_model_parallel_region(x_SBC, group=groups.tensor_group)


def with_output_prior(
    logits_SBV: torch.Tensor,
    scaled_z_SBC: torch.Tensor,
    embeddings_VC: torch.Tensor,
    trained_B: torch.Tensor,
    groups: ProcessGroups,
) -> torch.Tensor:
    """The network's logits plus <z, e_v>, z already scaled; float32.

    Args:
        trained_B: 1 for samples whose gradient reaches the embeddings, else 0; so in `predict`.
    """
    # Every rank's product is with its own embeddings, so the gradient of z is a sum over the ranks.
    z_SBC = copy_to_tensor_model_parallel_region(scaled_z_SBC, group=groups.tensor_group)
    return logits_SBV.float() + _product(z_SBC, embeddings_VC.t(), trained_B)


def predict(
    logits_SBV: torch.Tensor,
    embeddings_VC: torch.Tensor,
    tokens_SB: torch.Tensor,
    trained_B: torch.Tensor,
    groups: ProcessGroups,
) -> Prediction:
    """Mean embedding under softmax(logits), and the cross-entropy of the tokens."""
    largest_SB = logits_SBV.detach().amax(-1)
    if groups.tensor_parallel_size > 1:
        dist.all_reduce(largest_SB, op=dist.ReduceOp.MAX, group=groups.tensor_group)
    weights_SBV = (logits_SBV - largest_SB[..., None]).exp()
    local_SB, held_SB = _local(tokens_SB, len(embeddings_VC), groups)
    of_tokens_SB = _at(logits_SBV, local_SB) * held_SB
    parts = (
        _product(weights_SBV, embeddings_VC, trained_B),
        weights_SBV.sum(-1, keepdim=True),
        of_tokens_SB[..., None],
    )
    # What follows is the same on every rank, and so is the gradient of this sum.
    sums = reduce_from_tensor_model_parallel_region(torch.cat(parts, dim=-1), group=groups.tensor_group)
    weighted_SBC, total_SB1, logit_SB1 = sums.split((embeddings_VC.shape[1], 1, 1), dim=-1)
    nll_SB = total_SB1[..., 0].log() + largest_SB - logit_SB1[..., 0]
    return Prediction(weighted_SBC / total_SB1, nll_SB)


def _local(tokens: torch.Tensor, rows: int, groups: ProcessGroups) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of this rank's part of the vocabulary, 0 where another holds the token, and whether it holds it."""
    local = tokens - groups.tensor_parallel_rank * rows
    held = (local >= 0) & (local < rows)
    return torch.where(held, local, 0), held


def _product(x_SBK: torch.Tensor, w_KN: torch.Tensor, trained_B: torch.Tensor) -> torch.Tensor:
    """x W, where W gets its gradient from some of the samples only."""
    apply: Callable[..., torch.Tensor] = _Product.apply
    return apply(x_SBK, w_KN, trained_B)


def _at(logits_SBV: torch.Tensor, tokens_SB: torch.Tensor) -> torch.Tensor:
    """The logits of one token each, (S, B): `gather`, which for its gradient would keep all logits."""
    apply: Callable[..., torch.Tensor] = _At.apply
    return apply(logits_SBV, tokens_SB)


class _At(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_SBV: torch.Tensor, tokens_SB: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tokens_SB)
        ctx.vocabulary = logits_SBV.shape[-1]
        return logits_SBV.gather(-1, tokens_SB[..., None])[..., 0]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (tokens_SB,), (gradient_SB,) = ctx.saved_tensors, gradients
        gradient_SBV = gradient_SB.new_zeros(*gradient_SB.shape, ctx.vocabulary)
        return gradient_SBV.scatter_(-1, tokens_SB[..., None], gradient_SB[..., None]), None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SBK: torch.Tensor, w_KN: torch.Tensor, trained_B: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_SBK, w_KN, trained_B)
        return x_SBK @ w_KN

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x_SBK, w_KN, trained_B = ctx.saved_tensors
        (gradient_SBN,) = gradients
        x_gradient_SBK = gradient_SBN @ w_KN.t() if ctx.needs_input_grad[0] else None
        w_gradient_KN = None
        if ctx.needs_input_grad[1]:
            # The vocabulary is one of the two sides: leave the samples out on the other.
            if x_SBK.shape[-1] < gradient_SBN.shape[-1]:
                x_SBK = x_SBK * trained_B[:, None]
            else:
                gradient_SBN = gradient_SBN * trained_B[:, None]
            w_gradient_KN = x_SBK.flatten(0, 1).t() @ gradient_SBN.flatten(0, 1)
        return x_gradient_SBK, w_gradient_KN, None
