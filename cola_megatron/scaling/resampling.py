"""Bootstrap over runs: samples of a study that might have been, and the intervals that they give.

The wild bootstrap (Wu 1986; clustered: Cameron, Gelbach and Miller 2008) keeps the design of the study, its sizes and
budgets, and draws the residuals anew: each keeps its own size, so runs may be unequally noisy, and gets a random sign.
Runs that were drawn together (decay branches of one trunk, runs of one seed where that is feared) share their sign.
Residuals are divided by 1 - leverage (HC3), as a run that pulls the fit towards itself shows less of its noise than it
has, and each sample by sqrt(chi^2 / degrees of freedom), as few runs do not say how noisy they are. A bootstrap that
draws whole runs instead often draws a study from which nothing can be fitted, where runs are as few as here.
"""

import zlib
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
LEAST_GROUPS = 6
"""Of fewer groups the random signs have under 64 patterns, and their 95% interval is mostly luck."""


class Interval(NamedTuple):
    """Bounds between which the truth lies at the stated confidence."""

    low: float
    high: float

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float | np.number) and bool(self.low <= value <= self.high)


def interval(samples_R: Floats, confidence: float = CONFIDENCE) -> Interval:
    """The central quantiles of the samples; samples that are no number are left out, infinite ones count."""
    known_R = samples_R[~np.isnan(samples_R)]
    if not len(known_R):
        return Interval(float("nan"), float("nan"))
    ends = [(1 - confidence) / 2, (1 + confidence) / 2]
    if np.isinf(known_R).any():
        # Nothing can be interpolated beside an infinite one.
        ordered_R = np.sort(known_R)
        low, high = (ordered_R[round(end * (len(ordered_R) - 1))] for end in ends)
    else:
        low, high = np.quantile(known_R, ends)
    return Interval(float(low), float(high))


def band(samples_RX: Floats, confidence: float = CONFIDENCE) -> tuple[Floats, Floats]:
    """`interval` of each column: low and high ends, (X,) each."""
    ends_X2 = np.array([interval(samples_R, confidence) for samples_R in samples_RX.T])
    return ends_X2[:, 0], ends_X2[:, 1]


def numbered_groups(groups: Sequence[Hashable] | None, order_P: NDArray[np.intp]) -> NDArray[np.intp]:
    """For each point, taken in `order_P`, the number of its group, in order of first appearance.

    Raises:
        ValueError: too few groups to resample.
    """
    if groups is None:
        return np.arange(len(order_P))
    numbers: dict[Hashable, int] = {}
    found_P = np.array([numbers.setdefault(groups[index], len(numbers)) for index in order_P])
    if len(numbers) < LEAST_GROUPS:
        raise ValueError(
            f"groups: {len(numbers)} groups are too few to resample, at least {LEAST_GROUPS} are needed; "
            "give an id per trunk, such as (size, seed), or no groups where each run is its own"
        )
    return found_P


def wild_residuals(
    residuals_P: Floats,
    leverages_P: Floats,
    groups_P: NDArray[np.intp],
    free: int,
    count: int,
    generator: np.random.Generator,
    signs_RG: Floats | None = None,
) -> Floats:
    """Residuals of `count` studies with the same design, (count, P).

    Args:
        leverages_P: the diagonal of the hat matrix; at most 0.95 is believed.
        groups_P: number of the group of each point.
        free: degrees of freedom, groups less parameters; at least 1 is believed.
        signs_RG: of `paired_signs`; None: drawn by the generator.
    """
    full_P = residuals_P / np.maximum(1 - leverages_P, 0.05)
    if signs_RG is None:
        signs_RG = generator.choice(np.array([-1.0, 1.0]), size=(count, int(groups_P.max()) + 1))
    free = max(free, 1)
    # The square root of an inverse chi^2 has heavy tails at few degrees of freedom: those of Student's t.
    spread_R = np.sqrt(free / generator.chisquare(free, size=count))
    return full_P * signs_RG[:, groups_P] * spread_R[:, None]


def paired_signs(
    pairs: Sequence[Hashable], order_P: NDArray[np.intp], groups_P: NDArray[np.intp], count: int, seed: int
) -> Floats:
    """A sign for each sample and group, (count, G), drawn from the id of the group's first run and the seed alone.

    So two fits with equal ids and seeds have paired samples, and noise that their runs share (one order of the data)
    is gone from the difference of their curves.

    Args:
        pairs: an id per run, whose `repr` counts.
        order_P: of the runs in `groups_P`.
    """
    firsts = [pairs[order_P[int(np.argmax(groups_P == group))]] for group in range(int(groups_P.max()) + 1)]
    streams = (np.random.default_rng([seed, zlib.crc32(repr(each).encode())]) for each in firsts)
    return np.column_stack([stream.choice(np.array([-1.0, 1.0]), size=count) for stream in streams])


def leverages(slopes_PK: Floats, weights_P: Floats) -> Floats:
    """Diagonal of the hat matrix of a weighted least-squares fit with these derivatives of its predictions."""
    scaled_PK = slopes_PK * np.sqrt(weights_P)[:, None]
    sizes_K = np.linalg.norm(scaled_PK, axis=0)
    basis_PK, singular_K, _ = np.linalg.svd(scaled_PK[:, sizes_K > 0] / sizes_K[sizes_K > 0], full_matrices=False)
    kept = basis_PK[:, singular_K > 1e-10 * singular_K.max(initial=0)]
    return (kept**2).sum(axis=1)
