"""Confidence intervals of accuracies. Proportions lie in 0 .. 1."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Quantile of the standard normal for 95%, two-sided.
Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    """A proportion and its 95% confidence interval."""

    value: float
    low: float
    high: float


def wilson_interval(correct: int, n: int) -> Interval:
    """Wilson's score interval of correct / n.

    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), with p = correct / n and z = 1.96.

    Raises:
        ValueError: not 0 <= correct <= n with n > 0.
    """
    if not 0 <= correct <= n or n == 0:
        raise ValueError(f"{correct} of {n} is no proportion")
    p, z2 = correct / n, Z_95**2
    center = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # Exact at the ends, where rounding would leave the interval just short of p.
    return Interval(p, 0.0 if correct == 0 else center - half, 1.0 if correct == n else center + half)


def mean_interval(parts: Sequence[Interval]) -> Interval:
    """The mean of independent proportions, each counting alike.

    The distances of the single limits are recombined ("MOVER"): with k parts p_i in [l_i, u_i] and mean m,
    low = m - sqrt(sum (p_i - l_i)^2) / k and high = m + sqrt(sum (u_i - p_i)^2) / k.
    """
    k = len(parts)
    mean = sum(part.value for part in parts) / k
    below = math.sqrt(sum((part.value - part.low) ** 2 for part in parts)) / k
    above = math.sqrt(sum((part.high - part.value) ** 2 for part in parts)) / k
    return Interval(mean, mean - below, mean + above)
