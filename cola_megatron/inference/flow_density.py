"""The log-density of what a flow generates, by the instantaneous change of variables.

    log p(z0) = log N(z1; 0, I) + int_0^1 div v(z_t, t) dt      along dz/dt = v(z, t) from t = 0 to 1

Shapes: R rows, N blocks of a row, D coordinates of a block, E = D + 1: the coordinates, then the integral so far. The
Jacobian of the velocity is block diagonal, so every block has a divergence and a density of its own.
"""

import math
from collections.abc import Callable, Iterator

import torch

from cola_megatron.inference.solvers import RULES, quadratic_grid, solve

FlowVelocity = Callable[[torch.Tensor, float], torch.Tensor]
"""v(z, t) of all blocks, (R, N, D) -> (R, N, D), differentiable; no block's velocity depends on another block."""


def flow_log_density(
    velocity: FlowVelocity,
    z_RND: torch.Tensor,
    solver: str,
    steps: int,
    probe_RND: torch.Tensor | None,
) -> torch.Tensor:
    """log p(z0) of each block in nats, (R, N), float64.

    The solver integrates coordinates and divergence as one state, in float64; the velocity is asked in the type of
    `z_RND`.

    Args:
        z_RND: z0, what the flow would have generated.
        solver: one of `solvers.RULES`.
        steps: on `solvers.quadratic_grid`.
        probe_RND: of Hutchinson's estimator, fixed for the whole way: the estimate is unbiased (up to the solver's
            error). None: the exact divergence, D passes backwards in place of one.
    """
    times_T = quadratic_grid(steps)
    times = times_T.tolist()

    def augmented(state_RNE: torch.Tensor, step: int) -> torch.Tensor:
        slope_RND, divergence_RN = with_divergence(
            lambda z_RND: velocity(z_RND, times[step]), state_RNE[..., :-1].to(z_RND.dtype), probe_RND
        )
        return torch.cat((slope_RND.double(), divergence_RN[..., None]), dim=-1)

    start_RNE = torch.cat((z_RND.double(), torch.zeros_like(z_RND[..., :1], dtype=torch.float64)), dim=-1)
    end_RNE = solve(RULES[solver], augmented, start_RNE, times_T)
    return standard_normal_log_density(end_RNE[..., :-1]) + end_RNE[..., -1]


def with_divergence(
    velocity: Callable[[torch.Tensor], torch.Tensor], z_RND: torch.Tensor, probe_RND: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """v(z), and div v: Hutchinson's e^T J e for each block, or exactly the trace of J; (R, N, D) and (R, N), float64.

    J is block diagonal, so one pass backwards serves all blocks of all rows at once.
    """
    with torch.enable_grad():
        z_RND = z_RND.detach().requires_grad_()
        v_RND = velocity(z_RND)
    divergence_RN = torch.zeros(z_RND.shape[:-1], dtype=torch.float64, device=z_RND.device)
    if not v_RND.requires_grad:  # a velocity that does not depend on z
        return v_RND, divergence_RN
    for probe in _basis(z_RND) if probe_RND is None else [probe_RND]:
        (product_RND,) = torch.autograd.grad(
            v_RND, z_RND, probe.to(v_RND.dtype), retain_graph=probe_RND is None, materialize_grads=True
        )
        divergence_RN += (product_RND.double() * probe).sum(-1)
    return v_RND.detach(), divergence_RN


def standard_normal_log_density(z_RND: torch.Tensor) -> torch.Tensor:
    """log N(z; 0, I) over the last dimension, float64."""
    return -0.5 * (z_RND.double().square() + math.log(2 * math.pi)).sum(-1)


def _basis(z_RND: torch.Tensor) -> Iterator[torch.Tensor]:
    """The unit vectors of a block, each in all blocks at once."""
    for coordinate in range(z_RND.shape[-1]):
        unit_RND = torch.zeros_like(z_RND)
        unit_RND[..., coordinate] = 1.0
        yield unit_RND
