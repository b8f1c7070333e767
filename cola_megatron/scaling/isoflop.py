"""IsoFLOP profiles: loss against size at one budget, and its minimum.

The minima are those of a fitted surface, never of a parabola through the runs of one budget. A profile is no parabola
in log N (it is steeper towards small models where alpha > beta), so a parabola's vertex is off by an amount that
depends on which sizes were run, and where those drift against the optimum with the budget, so do its exponents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from cola_megatron.scaling.loss_surface import FLOPS_PER_PARAMETER_AND_TOKEN, LossSurface, Optimum
from cola_megatron.scaling.points import positive_numbers
from cola_megatron.scaling.separable import Floats


@dataclass(frozen=True)
class IsoFlopProfile:
    """The loss of a budget at each size."""

    compute: float
    minimum: Optimum
    """Size, tokens and loss at the minimum, with intervals."""
    N: Floats
    D: Floats
    """compute / (6 N)."""
    loss: Floats
    low: Floats
    high: Floats
    """Interval of the surface at each size."""


def isoflop_profiles(
    fit: LossSurface, budgets: Sequence[float], sizes: ArrayLike | None = None, decades: float = 1.0, count: int = 41
) -> tuple[IsoFlopProfile, ...]:
    """Profiles of a fitted surface at budgets in FLOPs; the exponents of their minima are `fit.a` and `fit.b`.

    Args:
        sizes: N of the curves; None: `count` sizes, `decades` around each minimum.

    Raises:
        ValueError: a budget or size that is no positive number, or a surface without an optimum.
    """
    profiles = []
    for compute in positive_numbers("budgets", budgets):
        minimum = fit.optimal(float(compute))
        if sizes is None:
            N = minimum.N.value * np.logspace(-decades / 2, decades / 2, count)
        else:
            N = positive_numbers("sizes", sizes)
        D = compute / (FLOPS_PER_PARAMETER_AND_TOKEN * N)
        low, high = fit.band(N, D)
        profiles.append(IsoFlopProfile(float(compute), minimum, N, D, fit.loss(N, D), low, high))
    return tuple(profiles)
