"""Cross-entropy over a large vocabulary without its logits: head and loss in chunks of positions.

For the logits l = W h + b of a position and its target y

    nll = logsumexp(l) - l_y,   d nll / d l = softmax(l) - onehot(y)

so a chunk's gradient is known as soon as its logits are. It is multiplied out at once, into the gradients of h, W and b
for a loss sum_n w_n nll_n of known weights w; the backward pass only scales them. No more than one chunk of logits ever
exists, and the matrices are multiplied no more often than without chunks.

Shapes: N positions, n of one chunk, H hidden, V rows of the vocabulary on this rank, P the same with padding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from cola_megatron.parallel import ProcessGroups

ALIGNED_ROWS = 64
"""Rows are padded to a multiple: tensor cores are three times slower on a matrix whose rows do not begin at 16 bytes
(259 against 735 TFLOP/s for 100,278 rows on an H200)."""

ROWS_SCALED_AT_ONCE = 4096


@dataclass(frozen=True)
class HeadShard:
    """Which rows of the vocabulary this rank's weights are, and how many positions are computed at once."""

    groups: ProcessGroups
    padded_rows: int
    """Last rows of the shard that are no words."""
    chunk: int


def weighted_nll(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
    shard: HeadShard,
) -> torch.Tensor:
    """sum_n weights_n * nll_n, a float32 scalar, alike on every tensor-parallel rank.

    Args:
        hidden_NH: whole on every rank; so is its gradient.
        targets_N: token ids of the whole vocabulary.
        weights_N: float32; they get no gradient.
    """
    apply: Callable[..., torch.Tensor] = _WeightedNLL.apply
    return apply(hidden_NH, weight_VH, bias_V, targets_N, weights_N, shard)


class _WeightedNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        weights_N: torch.Tensor,
        shard: HeadShard,
    ) -> torch.Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        rows = len(weight_VH)
        spare = -rows % ALIGNED_ROWS if hidden_NH.is_cuda else 0
        weight_PH = F.pad(weight_VH, (0, 0, 0, spare)) if spare else weight_VH
        bias_P = F.pad(bias_V, (0, spare)) if spare and bias_V is not None else bias_V
        first_row = shard.groups.tensor_parallel_rank * rows
        several_chunks = len(hidden_NH) > shard.chunk
        # The sum over chunks is taken in float32; a single one rounds once, as a linear layer's own gradient does.
        sums_in = torch.float32 if several_chunks else weight_VH.dtype

        loss = torch.zeros((), device=hidden_NH.device)
        hidden_gradient_NH = torch.empty_like(hidden_NH) if needs_hidden else None
        weight_gradient_PH = torch.zeros_like(weight_PH, dtype=sums_in) if needs_weight and several_chunks else None
        bias_gradient_P = torch.zeros(len(weight_PH), device=hidden_NH.device) if needs_bias else None
        for start in range(0, len(hidden_NH), shard.chunk):
            here = slice(start, start + shard.chunk)
            hidden_nH = hidden_NH[here]
            logits_nP = F.linear(hidden_nH, weight_PH, bias_P)
            if spare + shard.padded_rows:
                logits_nP[:, rows - shard.padded_rows :] = torch.finfo(logits_nP.dtype).min
            targets_n, weights_n = targets_N[here] - first_row, weights_N[here]
            held_n = (targets_n >= 0) & (targets_n < rows)
            targets_n = torch.where(held_n, targets_n, 0)
            target_logits_n = _of_targets(logits_nP, targets_n, held_n)
            lse_n = _logsumexp(logits_nP)
            if shard.groups.tensor_parallel_size > 1:
                lse_n, target_logits_n = _over_the_ranks(lse_n, target_logits_n, shard.groups)
            loss += torch.dot(weights_n, lse_n - target_logits_n)
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            # softmax(l) - onehot(y), whose element at the target is a difference of its own: rounded as one.
            at_target_n = torch.where(held_n, torch.expm1(target_logits_n - lse_n) * weights_n, 0.0)
            gradient_nP = _softmax_gradient(logits_nP, lse_n, weights_n)
            not_held_n = gradient_nP.gather(1, targets_n[:, None])[:, 0]
            gradient_nP.scatter_(
                1, targets_n[:, None], torch.where(held_n, at_target_n.to(gradient_nP.dtype), not_held_n)[:, None]
            )
            if hidden_gradient_NH is not None:
                torch.mm(gradient_nP, weight_PH, out=hidden_gradient_NH[here])
            if weight_gradient_PH is not None:
                _add_product(weight_gradient_PH, gradient_nP.t(), hidden_nH)
            elif needs_weight:
                weight_gradient_PH = gradient_nP.t() @ hidden_nH
            if bias_gradient_P is not None:
                bias_gradient_P += gradient_nP.sum(0, dtype=torch.float32)
        if hidden_gradient_NH is not None and shard.groups.tensor_parallel_size > 1:
            dist.all_reduce(hidden_gradient_NH, group=shard.groups.tensor_group)
        ctx.gradients = (
            hidden_gradient_NH,
            None if weight_gradient_PH is None else weight_gradient_PH[:rows].to(weight_VH.dtype),
            None if bias_gradient_P is None or bias_V is None else bias_gradient_P[:rows].to(bias_V.dtype),
        )
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (loss_gradient,) = gradients
        kept, ctx.gradients = ctx.gradients, None
        if kept is None:
            raise RuntimeError("the gradients of a chunked cross-entropy were used already; run its forward again")
        return (
            *(None if gradient is None else _scaled(gradient, loss_gradient) for gradient in kept),
            None,
            None,
            None,
        )


def _scaled(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """In place and in float32, rounded once: a factor in bfloat16 would be wrong in the same direction everywhere.

    By parts: float32 copies of the whole gradient of a head would be the largest moment of a step.
    """
    if gradient.dtype == factor.dtype:
        return gradient.mul_(factor)
    for part in gradient.split(ROWS_SCALED_AT_ONCE):
        part.copy_(part.float() * factor)
    return gradient


def _of_targets(logits_nP: torch.Tensor, targets_n: torch.Tensor, held_n: torch.Tensor) -> torch.Tensor:
    """Logit of each target, float32; 0 where another rank holds it."""
    return torch.where(held_n, logits_nP.gather(1, targets_n[:, None])[:, 0].float(), 0.0)


def _plain_logsumexp(logits_nP: torch.Tensor) -> torch.Tensor:
    return logits_nP.float().logsumexp(-1)


def _plain_softmax_gradient(logits_nP: torch.Tensor, lse_n: torch.Tensor, weights_n: torch.Tensor) -> torch.Tensor:
    return (torch.exp(logits_nP.float() - lse_n[:, None]) * weights_n[:, None]).to(logits_nP.dtype)


def _over_the_ranks(
    lse_n: torch.Tensor, target_logits_n: torch.Tensor, groups: ProcessGroups
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp over the whole vocabulary, and the target's logit from the rank that holds it."""
    largest_n = lse_n.clone()
    dist.all_reduce(largest_n, op=dist.ReduceOp.MAX, group=groups.tensor_group)
    sums_2n = torch.stack((torch.exp(lse_n - largest_n), target_logits_n))
    dist.all_reduce(sums_2n, group=groups.tensor_group)
    return sums_2n[0].log() + largest_n, sums_2n[1]


def _add_product(sum_PH: torch.Tensor, left_Pn: torch.Tensor, right_nH: torch.Tensor) -> None:
    """sum += left @ right, whatever the types of the factors."""
    if left_Pn.dtype == sum_PH.dtype:
        sum_PH.addmm_(left_Pn, right_nH)
    elif left_Pn.is_cuda:
        sum_PH += torch.mm(left_Pn, right_nH, out_dtype=sum_PH.dtype)
    else:
        sum_PH += left_Pn.float() @ right_nH.float()


def _fused_on_cuda(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """One kernel that reads the logits once, where there is a GPU: plain torch makes a float32 copy of them first."""
    compiled: list[Callable[..., torch.Tensor]] = []

    def run(logits_nP: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        if not logits_nP.is_cuda:
            return function(logits_nP, *others)
        if not compiled:
            compiled.append(torch.compile(function, dynamic=False))
        return compiled[0](logits_nP, *others)

    return run


_logsumexp = _fused_on_cuda(_plain_logsumexp)
_softmax_gradient = _fused_on_cuda(_plain_softmax_gradient)
