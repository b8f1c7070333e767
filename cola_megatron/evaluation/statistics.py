"""Confidence intervals of accuracies, which are proportions in 0 .. 1, and of sums per unit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Quantile of the standard normal for 95%, two-sided.
Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    """A figure, such as a proportion, and its 95% confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Figure:
    """A figure with its interval, and its standard error over what was drawn: items, or the texts they come from."""

    interval: Interval
    standard_error: float

    def as_json(self) -> dict[str, float | None]:
        """`value`, `standard_error`, `low`, `high`; what is not known, or too large, is null."""
        found = {"value": self.interval.value, "standard_error": self.standard_error}
        found |= {"low": self.interval.low, "high": self.interval.high}
        return {name: number if math.isfinite(number) else None for name, number in found.items()}


def wilson_interval(correct: int, n: int) -> Interval:
    """Wilson's score interval of correct / n.

    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), with p = correct / n and z = 1.96.

    Raises:
        ValueError: not 0 <= correct <= n with n > 0.
    """
    if not 0 <= correct <= n or n == 0:
        raise ValueError(f"{correct} of {n} is no proportion")
    return _wilson(correct / n, n)


def clustered_interval(correct: Sequence[int], sizes: Sequence[int]) -> Interval:
    """Of a proportion over items that come several at a time, as from one text: Wilson's, of an effective number.

    That is p (1 - p) / s^2, with the standard error s between the clusters (`ratio_standard_error`), and the number of
    items at most; the number of clusters where s says nothing: all items are right, or none, or there is one cluster.

    Args:
        correct, sizes: of each cluster, how many of its items are right, and how many there are.

    Raises:
        ValueError: no items.
    """
    n, whole = sum(sizes), sum(correct)
    if len(sizes) == n:
        return wilson_interval(whole, n)
    error, effective = ratio_standard_error(correct, sizes), float(len(sizes))
    p = whole / n
    if 0 < error < math.inf:
        effective = min(float(n), p * (1 - p) / error**2)
    return _wilson(p, effective)


def clustered_standard_error(correct: Sequence[int], sizes: Sequence[int]) -> float:
    """Of the same proportion: between the clusters (`ratio_standard_error`).

    Where that says nothing, since all items are right, or none, or there is one cluster, it is that of one item for
    each cluster with one right and one wrong added: a proportion of 0 is not known for certain.
    """
    error, clusters = ratio_standard_error(correct, sizes), len(sizes)
    if 0 < error < math.inf:
        return error
    p = (clusters * sum(correct) / sum(sizes) + 1) / (clusters + 2)
    return math.sqrt(p * (1 - p) / clusters)


def _wilson(p: float, n: float) -> Interval:
    z2 = Z_95**2
    center = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # Exact at the ends, where rounding would leave the interval just short of p.
    return Interval(p, 0.0 if p == 0 else center - half, 1.0 if p == 1 else center + half)


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


def ratio_interval(totals: Sequence[float], sizes: Sequence[float]) -> Interval:
    """Sum of totals over sum of sizes, such as nats per token over texts of different lengths.

    The normal interval r -+ z s of the ratio estimator; s is `ratio_standard_error`.

    Raises:
        ValueError: no texts, or their number is not that of the sizes.
    """
    half = Z_95 * ratio_standard_error(totals, sizes)
    ratio = sum(totals) / sum(sizes)
    return Interval(ratio, ratio - half, ratio + half)


def ratio_standard_error(totals: Sequence[float], sizes: Sequence[float]) -> float:
    """Of the ratio estimator r = sum a / sum b over n texts: s^2 = n / (n - 1) sum (a_i - r b_i)^2 / (sum b)^2.

    One text says nothing of the spread: infinite.

    Raises:
        ValueError: no texts, or their number is not that of the sizes.
    """
    n, whole = len(totals), sum(sizes)
    if n != len(sizes) or not whole:
        raise ValueError(f"{n} totals over {len(sizes)} sizes, {whole} in all, are no ratio")
    if n == 1:
        return math.inf
    ratio = sum(totals) / whole
    squares = sum((total - ratio * size) ** 2 for total, size in zip(totals, sizes, strict=True))
    return math.sqrt(n / (n - 1) * squares) / whole
