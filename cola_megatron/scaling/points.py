"""What a fit is given, checked: every complaint is one line that names the argument and the cure."""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

LEAST_RUNS = 6
"""One more than E, A, B, alpha, beta."""
LEAST_SIZES = 3
"""Of a power law with a constant beside it three sizes are the fewest that show the exponent."""


def positive_numbers(name: str, values: ArrayLike) -> Floats:
    """The values as a vector.

    Raises:
        ValueError: they are no flat sequence of positive, finite numbers.
    """
    try:
        vector = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: must be a sequence of numbers") from None
    if vector.ndim != 1:
        raise ValueError(f"{name}: must be a flat sequence of numbers, one per run, not of shape {vector.shape}")
    wrong = np.flatnonzero(~(np.isfinite(vector) & (vector > 0)))
    if len(wrong):
        raise ValueError(f"{name}: entry {wrong[0]} is {vector[wrong[0]]:g}; every run needs a positive, finite number")
    return vector


def same_lengths(**sequences: Sequence[object] | NDArray[np.generic] | None) -> None:
    """Raises ValueError where the sequences (None is left out) are not of one length."""
    lengths = {name: len(values) for name, values in sequences.items() if values is not None}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise ValueError(f"{said}: give one of each per run")


def checked_study(
    parameters: ArrayLike, tokens: ArrayLike, losses: ArrayLike, groups: Sequence[Hashable] | None
) -> tuple[Floats, Floats, Floats]:
    """Parameters, tokens and losses from which a surface of five parameters can be told.

    Raises:
        ValueError: it cannot be.
    """
    N_P, D_P = positive_numbers("parameters", parameters), positive_numbers("tokens", tokens)
    L_P = positive_numbers("losses", losses)
    same_lengths(parameters=N_P, tokens=D_P, losses=L_P, groups=groups)
    if len(L_P) < LEAST_RUNS:
        raise ValueError(f"{len(L_P)} runs are too few for E, A, B, alpha and beta: at least {LEAST_RUNS} are needed")
    for name, vector in (("parameters", N_P), ("tokens", D_P)):
        distinct = len(np.unique(vector))
        if distinct < LEAST_SIZES:
            said = "all runs are of one value" if distinct == 1 else f"the runs have {distinct} values"
            raise ValueError(f"{name}: {said}, and an exponent needs at least {LEAST_SIZES}; add runs of others")
    logs_P2 = np.column_stack([np.log(N_P), np.log(D_P)])
    logs_P2 = (logs_P2 - logs_P2.mean(axis=0)) / logs_P2.std(axis=0)
    if np.linalg.svd(logs_P2, compute_uv=False)[1] < 1e-3 * np.sqrt(len(L_P)):
        raise ValueError(
            "tokens follow from the parameters (one ratio of tokens to parameters at every size), so alpha and beta "
            "cannot be told apart; add runs of another ratio"
        )
    return N_P, D_P, L_P
