"""Integrating dz/dt = v(z, t): from noise (t = 1) to a clean latent (t = 0) in generation, the other way for a
likelihood (`flow_density.py`). The grid of times says which way.

A rule does one step. `integrate` takes all of them and shows each on the way; `solve` only answers with the end.

Shapes: `z` has any shape that the velocity accepts; in generation (S, B, C): S latents of one block, B batch, C latent
channels.
"""

from collections.abc import Callable, Generator
from typing import NamedTuple

import torch

Velocity = Callable[[torch.Tensor, int], torch.Tensor]
"""v(z, i) at the i-th time of the grid."""
Rule = Callable[[Velocity, torch.Tensor, int, list[float], torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]
"""(velocity, z at step i, i, times, v of the step before) -> (z at step i + 1, v at step i)."""


class Evaluation(NamedTuple):
    """Where the solver stands before step `step`: z at `time`, and the velocity there."""

    step: int
    time: float
    z: torch.Tensor
    velocity: torch.Tensor

    @property
    def clean(self) -> torch.Tensor:
        """z - t v: where the straight line through here ends, the estimate of the clean latent."""
        return self.z - self.time * self.velocity


def uniform_grid(steps: int, device: torch.device) -> torch.Tensor:
    """steps + 1 times from 1 to 0, float32."""
    return torch.linspace(1000.0, 0.0, steps + 1, device=device) / 1000.0


def quadratic_grid(steps: int) -> torch.Tensor:
    """steps + 1 times (i / steps)^2 from 0 to 1, float64: dense where z is nearly clean.

    A posterior of width sigma makes the velocity change over times of about sigma, which is small. And the velocity at
    t = 0, on which no network is trained, counts for a first step of 1 / steps^2 only.
    """
    return torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64) ** 2


def euler(
    velocity: Velocity, z: torch.Tensor, step: int, times: list[float], earlier: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """z <- z - (t_i - t_{i+1}) v(z, t_i). Order 1."""
    slope = velocity(z, step)
    return z - slope * (times[step] - times[step + 1]), slope


def heun(
    velocity: Velocity, z: torch.Tensor, step: int, times: list[float], earlier: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Trapezoid: an Euler step, then the mean of the velocities at both ends. Order 2, two evaluations per step.

    A step that ends at t = 0 is Euler's: no network is trained on the velocity there. One step of local error O(h^2)
    leaves the order at 2.
    """
    ahead, slope = euler(velocity, z, step, times)
    if times[step + 1] == 0:
        return ahead, slope
    mean = (slope + velocity(ahead, step + 1)) / 2
    return z - mean * (times[step] - times[step + 1]), slope


def adams_bashforth(
    velocity: Velocity, z: torch.Tensor, step: int, times: list[float], earlier: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The line through this velocity and the one before, integrated over the step. Order 2, one evaluation per step.

    z <- z - h ((1 + r / 2) v_i - (r / 2) v_{i-1}) with r = h / (the step before); the first step is Euler's.
    """
    ahead, slope = euler(velocity, z, step, times)
    if earlier is None:
        return ahead, slope
    ratio = (times[step] - times[step + 1]) / (times[step - 1] - times[step])
    return ahead - (slope - earlier) * (ratio / 2 * (times[step] - times[step + 1])), slope


RULES: dict[str, Rule] = {"euler": euler, "heun": heun, "adams_bashforth": adams_bashforth}


def integrate(
    rule: Rule,
    velocity: Velocity,
    z: torch.Tensor,
    times: list[float],
    hold: Callable[[torch.Tensor, int], torch.Tensor] = lambda z, step: z,
    rounds: Callable[[int], int] = lambda step: 1,
    noise_back: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor] = lambda later, before, step: before,
) -> Generator[Evaluation, None, torch.Tensor]:
    """Yields what is known before each step is taken for good, and returns z at the last time.

    Args:
        hold: puts known positions back, before step i and at the end.
        rounds: how often step i is done.
        noise_back: (z at the end of step i, z at its beginning, i) -> where the step begins when it is repeated.
    """
    earlier = None
    for step, time in enumerate(times[:-1]):
        z = hold(z, step)
        later, slope = rule(velocity, z, step, times, earlier)
        for _ in range(rounds(step) - 1):
            z = hold(noise_back(later, z, step), step)
            later, slope = rule(velocity, z, step, times, earlier)
        yield Evaluation(step, time, z, slope)
        z, earlier = later, slope
    return hold(z, len(times) - 1)


def solve(rule: Rule, velocity: Velocity, z: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """z at the last time of the grid."""
    return finish(integrate(rule, velocity, z, times.tolist()))


def finish(steps: Generator[Evaluation, None, torch.Tensor]) -> torch.Tensor:
    """Runs an integration to its end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
