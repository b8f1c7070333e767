"""Scaling studies: their files, runs, tables and fits."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cola_megatron.scaling.isoflop import isoflop_profiles
    from cola_megatron.scaling.loss_curve import LossCurve, fit_loss_curve
    from cola_megatron.scaling.loss_surface import LossSurface, fit_loss_surface
    from cola_megatron.scaling.prediction_check import Points, check_prediction
    from cola_megatron.scaling.score_curve import ScoreCurve, fit_score_curve
    from cola_megatron.scaling.study import Study

__all__ = [
    "LossCurve",
    "LossSurface",
    "Points",
    "ScoreCurve",
    "Study",
    "check_prediction",
    "fit_loss_curve",
    "fit_loss_surface",
    "fit_score_curve",
    "isoflop_profiles",
]

_MODULES = {
    "isoflop_profiles": "isoflop",
    "LossCurve": "loss_curve",
    "fit_loss_curve": "loss_curve",
    "LossSurface": "loss_surface",
    "fit_loss_surface": "loss_surface",
    "Points": "prediction_check",
    "check_prediction": "prediction_check",
    "ScoreCurve": "score_curve",
    "fit_score_curve": "score_curve",
    "Study": "study",
}


def __getattr__(name: str):
    """They are imported on first use: a plan must not wait for SciPy."""
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
