"""The learned noise schedule gamma(t) of Plaid, and the two losses that train it.

    gamma(t) = gamma_0 + (gamma_1 - gamma_0) s(t),   s(t) = (g(t) - g(0)) / (g(1) - g(0))
    g(t) = sum_k softplus(v_k) tanh(softplus(w_k) (t - 1/2) + b_k)

As published: g is monotone, the end points gamma_0 and gamma_1 minimise the bound, and the shape s minimises the
variance over t of its estimate. The bound itself does not depend on the shape, so that minimising E[L^2] is minimising
the variance: the gradient of each sample's term L towards the shape is multiplied by 2 L.

The factor is 0.02 L here: AdamW divides a constant out again, but the norm by which all gradients are clipped together
does not, and unscaled the shape's would be most of it. (The published code clips at a quantile of the norms so far.)

How L comes here is ours as well: the loss is computed elsewhere, under a pipeline in another process. With the levels
goes a third output, `report`, of value 0, whose "gradient" is L (`report_loss`); one backward pass of `_ShapeGradient`
gets all three.

Shapes: B batch, K hidden units. Everything is computed in float64, whatever type the parameters have.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from cola_megatron.layers.initializers import normal
from cola_megatron.layers.roles import FIXED
from cola_megatron.parallel import mark_parameter

SHAPE_GRADIENT = 0.01
"""Of the gradient of E[L^2] towards the shape."""


class NoiseLevels(NamedTuple):
    """What the schedule says of a batch of times, (B,) each, float64."""

    gamma_B: torch.Tensor
    """gamma(t)."""
    slope_B: torch.Tensor
    """d gamma / dt."""
    gamma_end_B: torch.Tensor
    """gamma(1)."""
    report_B: torch.Tensor
    """0; see `report_loss`."""


class NoiseSchedule(nn.Module):
    """gamma(t) with learned ends and a learned shape.

    Args:
        hidden_size: K.
        gamma_start: gamma_0 at the start of training.
        gamma_end: gamma_1 likewise.
    """

    __call__: Callable[..., NoiseLevels]

    def __init__(self, hidden_size: int, gamma_start: float, gamma_end: float):
        super().__init__()
        self.input_scale = nn.Parameter(torch.empty(hidden_size))
        self.input_bias = nn.Parameter(torch.empty(hidden_size))
        self.output_scale = nn.Parameter(torch.empty(hidden_size))
        for parameter in (self.input_scale, self.input_bias, self.output_scale):
            mark_parameter(parameter, normal(1.0), FIXED)
        self.ends = nn.Parameter(torch.empty(2))
        mark_parameter(self.ends, lambda whole, generator: whole.copy_(torch.tensor([gamma_start, gamma_end])), FIXED)

    def forward(self, time_B: torch.Tensor, frozen_B: torch.Tensor | None = None) -> NoiseLevels:
        """Levels at times in [0, 1], (B,).

        Args:
            frozen_B: samples whose levels get no gradient.
        """
        shape_B, shape_slope_B, report_B = _with_shape_gradient(*self.shape(time_B.double()))
        start, end = self.ends.double()
        gamma_B = start + (end - start) * shape_B
        slope_B = (end - start) * shape_slope_B
        end_B = end.expand_as(gamma_B)
        if frozen_B is not None:
            gamma_B, slope_B, end_B = (
                torch.where(frozen_B, level.detach(), level) for level in (gamma_B, slope_B, end_B)
            )
        return NoiseLevels(gamma_B, slope_B, end_B, report_B)

    def shape(self, time_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """s(t) and its derivative, (B,): from exactly 0 at t = 0 to 1 at t = 1."""
        inner_K, bias_K = F.softplus(self.input_scale.double()), self.input_bias.double()
        outer_K = F.softplus(self.output_scale.double())

        def hidden(time: torch.Tensor) -> torch.Tensor:
            return torch.tanh((time[:, None] - 0.5) * inner_K + bias_K)

        hidden_BK = hidden(time_B)
        first_1K, last_1K = hidden(torch.zeros_like(time_B[:1])), hidden(torch.ones_like(time_B[:1]))
        height = (last_1K - first_1K) @ outer_K
        return (hidden_BK - first_1K) @ outer_K / height, (1 - hidden_BK.square()) @ (outer_K * inner_K) / height


def report_loss(loss_B: torch.Tensor, report_B: torch.Tensor) -> torch.Tensor:
    """The losses as they are, (B,); the schedule's shape learns to make their squares small.

    Args:
        report_B: `NoiseLevels.report_B` of the levels that the losses were computed with.
    """
    apply: Callable[..., torch.Tensor] = _Report.apply
    return apply(loss_B, report_B)


def _with_shape_gradient(shape_B: torch.Tensor, slope_B: torch.Tensor) -> tuple[torch.Tensor, ...]:
    apply: Callable[..., tuple[torch.Tensor, ...]] = _ShapeGradient.apply
    return apply(shape_B, slope_B)


class _ShapeGradient(torch.autograd.Function):
    """(s, s') -> (s, s', report); backward: gradients of s and s' times 2 L `SHAPE_GRADIENT`, L from `report`."""

    @staticmethod
    def forward(ctx: Any, shape_B: torch.Tensor, slope_B: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return shape_B.clone(), slope_B.clone(), torch.zeros_like(shape_B)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        shape_B, slope_B, loss_B = gradients
        factor_B = 2 * SHAPE_GRADIENT * loss_B
        return shape_B * factor_B, slope_B * factor_B


class _Report(torch.autograd.Function):
    """(loss, report) -> loss; backward: the value of the loss, whatever weight the loss has, goes to `report`."""

    @staticmethod
    def forward(ctx: Any, loss_B: torch.Tensor, report_B: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(loss_B)
        return loss_B.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (loss_B,) = ctx.saved_tensors
        return gradients[0], loss_B.to(gradients[0].dtype)
