"""A prediction made in advance: the runs of the largest budget predicted from the smaller ones, then read.

Repeated under each definition of N (with or without embeddings, with the VAE or the prior alone), as a conclusion that
holds under one of them only is one about counting.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from cola_megatron.scaling.loss_surface import FLOPS_PER_PARAMETER_AND_TOKEN, Estimate, LossSurface, fit_loss_surface
from cola_megatron.scaling.points import positive_numbers, same_lengths
from cola_megatron.scaling.resampling import CONFIDENCE

SAME_BUDGET = 0.05
"""Budgets within 5% of the largest are the largest: steps are whole, so runs of one budget differ a little."""


@dataclass(frozen=True)
class Points:
    """Runs of a study, one entry of each sequence per run."""

    parameters: ArrayLike | Mapping[str, ArrayLike]
    """N; or N under each of several definitions, by name."""
    tokens: ArrayLike
    losses: ArrayLike
    budgets: ArrayLike | None = None
    """FLOPs of each run, in the column by which the study was planned; None: 6 N D of the first definition."""
    groups: Sequence[Hashable] | None = None
    """As for `fit_loss_surface`."""

    def definitions(self) -> dict[str, ArrayLike]:
        """N by the name of its definition; `N` where there is one without a name."""
        return dict(self.parameters) if isinstance(self.parameters, Mapping) else {"N": self.parameters}


@dataclass(frozen=True)
class HeldOutRun:
    """One run that was predicted and then read."""

    index: int
    """Its place among the points."""
    N: float
    D: float
    predicted: Estimate
    """Loss and interval of a single run there, noise included."""
    seen: float

    @property
    def inside(self) -> bool:
        """Whether what was seen lies in the interval."""
        return self.predicted.low <= self.seen <= self.predicted.high

    @property
    def error(self) -> float:
        """predicted / seen - 1."""
        return self.predicted.value / self.seen - 1

    def __str__(self) -> str:
        low, high = self.predicted.interval
        return (
            f"N {self.N:.3g}, D {self.D:.3g}: predicted {self.predicted.value:.4f} ({low:.4f} to {high:.4f}), "
            f"seen {self.seen:.4f}, {'inside' if self.inside else 'outside'} the interval"
        )


@dataclass(frozen=True)
class PredictionCheck:
    """The held-out check under one definition of N."""

    definition: str
    runs: tuple[HeldOutRun, ...]
    fit: LossSurface
    """Of the runs that were not held out."""

    @property
    def inside(self) -> int:
        """How many of the runs lie in their interval."""
        return sum(run.inside for run in self.runs)

    def __str__(self) -> str:
        title = f"{self.definition}: {self.inside} of {len(self.runs)} held-out runs inside"
        return "\n".join([title, *(f"  {run}" for run in self.runs)])


def check_prediction(
    points: Points,
    held_out: ArrayLike | None = None,
    *,
    huber_delta: float | None = None,
    bootstrap: int = 400,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> dict[str, PredictionCheck]:
    """Predicts held-out runs from the others under each definition of N; their losses are read last.

    Args:
        held_out: True for each run to predict; None: those of the largest budget, within 5%.
        huber_delta: as the further arguments, of `fit_loss_surface`.

    Raises:
        ValueError: no definition, no run or every run held out, or too little left for a fit.
    """
    definitions = points.definitions()
    if not definitions:
        raise ValueError("parameters: no definition of N is given")
    D_P, L_P = positive_numbers("tokens", points.tokens), positive_numbers("losses", points.losses)
    sizes = {name: positive_numbers(f"parameters ({name})", values) for name, values in definitions.items()}
    same_lengths(
        **{f"parameters ({name})": N_P for name, N_P in sizes.items()}, tokens=D_P, losses=L_P, groups=points.groups
    )
    held_out_P = _held_out(points, held_out, next(iter(sizes.values())), D_P)
    known_P, unseen = ~held_out_P, np.flatnonzero(held_out_P)
    groups = None if points.groups is None else [points.groups[index] for index in np.flatnonzero(known_P)]
    checks = {}
    for name, N_P in sizes.items():
        fit = fit_loss_surface(
            N_P[known_P],
            D_P[known_P],
            L_P[known_P],
            groups=groups,
            huber_delta=huber_delta,
            bootstrap=bootstrap,
            confidence=confidence,
            seed=seed,
        )
        predictions = [fit.predict(N_P[index], D_P[index], single_run=True) for index in unseen]
        runs = (
            HeldOutRun(int(index), float(N_P[index]), float(D_P[index]), predicted, float(L_P[index]))
            for index, predicted in zip(unseen, predictions, strict=True)
        )
        checks[name] = PredictionCheck(name, tuple(runs), fit)
    return checks


def _held_out(points: Points, held_out: ArrayLike | None, N_P: np.ndarray, D_P: np.ndarray) -> np.ndarray:
    if held_out is None:
        if points.budgets is None:
            budgets_P = FLOPS_PER_PARAMETER_AND_TOKEN * N_P * D_P
        else:
            budgets_P = positive_numbers("budgets", points.budgets)
            same_lengths(budgets=budgets_P, tokens=D_P)
        held_out_P = budgets_P >= (1 - SAME_BUDGET) * budgets_P.max()
    else:
        held_out_P = np.asarray(held_out)
        if held_out_P.dtype != np.bool_ or held_out_P.shape != D_P.shape:
            raise ValueError(f"held_out: give True or False for each of the {len(D_P)} runs")
    if held_out_P.all() or not held_out_P.any():
        raise ValueError("held_out: some runs, not none and not all, must be held out")
    return held_out_P
