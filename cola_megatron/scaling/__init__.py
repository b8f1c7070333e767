"""Laws of scaling: their fits, rules for learning rate and batch, and the coordinate check."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cola_megatron.scaling.coordinates import CoordinateCheck, check_coordinates
    from cola_megatron.scaling.isoflop import isoflop_profiles
    from cola_megatron.scaling.loss_curve import LossCurve, fit_loss_curve
    from cola_megatron.scaling.loss_surface import LossSurface, fit_loss_surface
    from cola_megatron.scaling.prediction_check import Points, check_prediction
    from cola_megatron.scaling.score_curve import ScoreCurve, fit_score_curve
    from cola_megatron.studies.report.study import Study

__all__ = [
    "CoordinateCheck",
    "LossCurve",
    "LossSurface",
    "Points",
    "ScoreCurve",
    "Study",
    "check_coordinates",
    "check_prediction",
    "fit_loss_curve",
    "fit_loss_surface",
    "fit_score_curve",
    "isoflop_profiles",
]

_MODULES = {
    "check_coordinates": "cola_megatron.scaling.coordinates",
    "CoordinateCheck": "cola_megatron.scaling.coordinates",
    "isoflop_profiles": "cola_megatron.scaling.isoflop",
    "LossCurve": "cola_megatron.scaling.loss_curve",
    "fit_loss_curve": "cola_megatron.scaling.loss_curve",
    "LossSurface": "cola_megatron.scaling.loss_surface",
    "fit_loss_surface": "cola_megatron.scaling.loss_surface",
    "Points": "cola_megatron.scaling.prediction_check",
    "check_prediction": "cola_megatron.scaling.prediction_check",
    "ScoreCurve": "cola_megatron.scaling.score_curve",
    "fit_score_curve": "cola_megatron.scaling.score_curve",
    "Study": "cola_megatron.studies.report.study",
}


def __getattr__(name: str):
    """They are imported on first use: a plan must not wait for SciPy."""
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
