"""Muon for the matrices of the layers, AdamW for everything else, under every ZeRO stage and tensor parallelism.

    B <- mu B + (1 - mu) G;  U = (1 - mu) G + mu B;  W <- W - rate (decay W + 0.2 sqrt(max(rows, columns)) O(U))

O is five steps of the Newton-Schulz iteration (K. Jordan, Muon, https://kellerjordan.github.io/posts/muon/), which
brings all singular values near 1. The factor gives the update the root mean square of AdamW's (Moonlight,
arXiv:2502.16982, section 2.2), so that learning rate and weight decay are those of AdamW. Of fused projections each is
orthogonalised by itself: together, the larger gradients of one would set the scale of the others.

G is what AdamW would see: averaged over replicas, and clipped with all other gradients. Everything but O works element
by element on the flat tensors into which ZeRO puts parameters; for O the whole matrix is put together by
`MatrixExchange`. DeepSpeed's own Muon applies O before it measures and clips the gradient in ZeRO 1, 2 and 3 in
float32, after it in ZeRO 1 in bfloat16, where it refuses tensor parallelism.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from cola_megatron.parallel.groups import ProcessGroups
from cola_megatron.parallel.matrix_exchange import HeldMatrix, MatrixExchange
from cola_megatron.parallel.parameters import marks_of

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic x <- a x + b x^3 + c x^5, steepest at 0."""
STEPS = 5
RMS_OF_ADAMW = 0.2
"""Of an update before it is multiplied by the rate."""


def orthogonalized(matrix_NM: torch.Tensor) -> torch.Tensor:
    """The matrix with all its singular values brought near 1 (0.7 to 1.2), in its own type; one of zeros stays.

    It computes over the shorter side.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix_NM
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / torch.linalg.vector_norm(x).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def matched_update(matrix_NM: torch.Tensor, fused_rows: Sequence[int] | None) -> torch.Tensor:
    """O of a matrix, or of each of its fused projections, at the root mean square of an AdamW update.

    Args:
        fused_rows: as of `mark_parameter`.
    """
    if fused_rows is None:
        return orthogonalized(matrix_NM) * (RMS_OF_ADAMW * max(matrix_NM.shape) ** 0.5)
    groups = matrix_NM.unflatten(0, (-1, sum(fused_rows)))
    updates = [
        matched_update(part.flatten(0, 1), None).unflatten(0, (part.shape[0], -1))
        for part in groups.split(list(fused_rows), dim=1)
    ]
    return torch.cat(updates, dim=1).flatten(0, 1)


class MuonAdamW(torch.optim.AdamW):
    """AdamW that leaves the groups marked `"muon": True` to Muon.

    `share` or `share_whole` must have been called before the first step.

    Args:
        momentum: mu.
        dtype: what O is computed in, and matrices are exchanged in.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, momentum: float, dtype: torch.dtype, **options: Any):
        super().__init__(groups, **options)
        self.momentum, self.dtype = momentum, dtype
        self._exchange_of: dict[int, MatrixExchange] = {}

    def share(self, exchanges: Mapping[int, MatrixExchange]) -> None:
        """Of each tensor of a Muon group, by its id, the matrices of which it holds ranges."""
        self._exchange_of = dict(exchanges)

    def share_whole(self, groups: ProcessGroups) -> None:
        """Where the optimiser's tensors are the parameters themselves: without ZeRO."""
        parameters = [each for group in self.param_groups if group["muon"] for each in group["params"]]
        exchanges = {}
        for each in parameters:
            marks = marks_of(each)
            held = HeldMatrix(tuple(each.shape), marks.partition_dim, marks.fused_rows, 0, each.numel(), 0)
            exchanges[id(each)] = MatrixExchange([held], groups, everywhere=True)
        self.share(exchanges)

    def moments(self, flat: torch.Tensor) -> tuple[str, ...]:
        """Names of the state that belongs to one of the optimiser's tensors, each of its size."""
        return ("momentum",) if id(flat) in self._exchange_of else ("exp_avg", "exp_avg_sq")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update; a group whose rate is 0 changes its momentum alone."""
        groups = self.param_groups
        for group in groups:
            if group["muon"]:
                for flat in group["params"]:
                    if flat.grad is not None:
                        self._update(flat, flat.grad, group["lr"], group["weight_decay"])
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    def _update(self, flat: torch.Tensor, gradient: torch.Tensor, rate: float, decay: float) -> None:
        state = self.state[flat]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["momentum"] = torch.zeros_like(flat, memory_format=torch.preserve_format)
        state["step"] += 1
        state["momentum"].lerp_(gradient, 1 - self.momentum)
        if rate == 0:
            return
        # In place: nothing reads the gradient after the update.
        ahead = gradient.lerp_(state["momentum"], self.momentum).view(-1)
        values = flat.view(-1).mul_(1 - rate * decay)
        for start, update in self._exchange_of[id(flat)].updates(ahead, self.dtype, matched_update):
            values.narrow(0, start, update.numel()).add_(update.to(values), alpha=-rate)
