"""Solvers on equations with closed forms: their order, what they show on the way, repeated steps."""

import itertools
import math

import pytest
import torch

from cola_megatron.inference.settings import SOLVERS, FlowSettings
from cola_megatron.inference.solvers import RULES, finish, integrate, solve, uniform_grid

START = torch.tensor([1.5, -0.5], dtype=torch.float64)


def times(steps: int, uneven: bool) -> torch.Tensor:
    grid = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    return grid**1.5 if uneven else grid


def error(solver: str, steps: int, uneven: bool = False) -> float:
    """dz/dt = (1 + 3 t^2) z from t = 1 has the solution z(0) = z(1) exp(-2)."""
    grid = times(steps, uneven)
    found = solve(RULES[solver], lambda z, i: (1 + 3 * grid[i] ** 2) * z, START, grid)
    return (found - START * math.exp(-2)).abs().max().item()


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("adams_bashforth", 2)])
def test_the_error_falls_with_the_order_of_the_solver(solver, order, uneven):
    errors = [error(solver, steps, uneven) for steps in (64, 128, 256)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_every_solver_of_the_settings_is_there_and_follows_a_straight_path_exactly():
    assert set(RULES) == set(SOLVERS)
    noise, clean = torch.randn(2, 5, dtype=torch.float64)
    for solver in SOLVERS:
        FlowSettings(solver=solver)
        found = solve(RULES[solver], lambda z, i: noise - clean, noise, times(4, uneven=True))
        torch.testing.assert_close(found, clean)


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 8), ("adams_bashforth", 8), ("heun", 15)])
def test_evaluations_and_no_velocity_is_asked_at_zero(solver, evaluations):
    asked = []

    def velocity(z: torch.Tensor, step: int) -> torch.Tensor:
        asked.append(step)
        return z

    solve(RULES[solver], velocity, START, times(8, uneven=False))
    assert len(asked) == evaluations and max(asked) == 7


def test_the_way_shows_each_step_with_its_clean_estimate():
    grid = uniform_grid(4, torch.device("cpu")).tolist()
    seen, steps = [], integrate(RULES["euler"], lambda z, i: z * (i + 1), START, grid)
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as end:
            last = end.value
            break
    assert [evaluation.step for evaluation in seen] == [0, 1, 2, 3]
    assert [evaluation.time for evaluation in seen] == grid[:-1]
    for evaluation, later in zip(seen, [*(evaluation.z for evaluation in seen[1:]), last], strict=True):
        torch.testing.assert_close(evaluation.velocity, evaluation.z * (evaluation.step + 1))
        torch.testing.assert_close(evaluation.clean, evaluation.z - evaluation.time * evaluation.velocity)
        torch.testing.assert_close(later, evaluation.z - evaluation.velocity / 4)


def test_a_step_is_repeated_from_where_it_is_noised_back_to():
    calls = []

    def noise_back(later: torch.Tensor, before: torch.Tensor, step: int) -> torch.Tensor:
        calls.append((step, (later - before).abs().max().item() > 0))
        return before

    def run(rounds: int) -> torch.Tensor:
        grid = times(4, uneven=False).tolist()
        return finish(
            integrate(RULES["euler"], lambda z, i: z, START, grid, rounds=lambda step: rounds, noise_back=noise_back)
        )

    assert torch.equal(run(1), run(3))
    assert calls == [(step, True) for step in (0, 0, 1, 1, 2, 2, 3, 3)]


def test_what_is_held_is_back_before_every_step_and_at_the_end():
    grid = times(4, uneven=False).tolist()

    def hold(z: torch.Tensor, step: int) -> torch.Tensor:
        return torch.stack((torch.tensor(float(step), dtype=z.dtype), z[1]))

    steps = integrate(RULES["euler"], lambda z, i: z, START, grid, hold)
    seen = [next(steps).z.tolist() for _ in range(4)]
    assert [z[0] for z in seen] == [0.0, 1.0, 2.0, 3.0]
    with pytest.raises(StopIteration) as end:
        next(steps)
    assert end.value.value.tolist() == [4.0, pytest.approx(START[1].item() * 0.75**4)]
