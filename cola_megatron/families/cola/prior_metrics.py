"""What the prior has learned, beside what a sceptic would compare it with: from the sums of a held-out measurement."""

import math
from collections.abc import Mapping

import torch

from cola_megatron.config import ColaConfig
from cola_megatron.families.cola.velocity_passes import FIXED_TIMES, TIME_BINS
from cola_megatron.objectives.flow_matching import constant_predictor_loss
from cola_megatron.objectives.linear_denoiser import linear_error, linear_predictor, moments_of_latents


def sum_shapes(config: ColaConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of those sums that are no scalars."""
    times, moments = len(FIXED_TIMES), 1 + 2 * config.model.dit.latent_dim
    return {
        "sum_moments": (times, moments, moments),
        "sum_spread": (6,),
        **{f"sum_error_{name}": (times,) for name in ("with", "without", "shuffled")},
    }


def prior_metrics(sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The prior's losses, all on the same latents, noise and equally spaced times, each the mean over these times.

    Returns:
        `flow_matching_loss` with its context, `flow_matching_loss_without_context` (every block alone),
        `flow_matching_loss_shuffled_context` (that of another text, where it was measured), `linear_predictor_loss`
        (the best linear denoiser of one latent), `constant_predictor_loss`; each but the last two controls also as
        `<name>_bin_<i>` over equal bins of t;
        `context_gain`, the loss without less the loss with context; `context_information`, the same in nats per
        latent, C * integral of gain(t) (1 - t) / t dt, which for perfect denoisers is the mutual information of a
        latent and its context (Guo, Shamai and Verdu 2005, arXiv cs/0412108, with snr = ((1 - t) / t)^2);
        the `_standard_error` of loss, gain and information over samples;
        `flow_matching_loss_training_times`: with context, at the run's own distribution of t.
    """
    matrices, times = sums["sum_moments"], torch.tensor(FIXED_TIMES, dtype=torch.float64)
    count_M = matrices[:, 0, 0]
    mean_C, covariance_CC = moments_of_latents(matrices, times)
    finite = bool(matrices.isfinite().all())  # a model that has diverged has no moments
    linear_M = torch.tensor(
        [
            linear_error(matrix, linear_predictor(t, mean_C, covariance_CC)) if finite and matrix[0, 0] else math.nan
            for matrix, t in zip(matrices, FIXED_TIMES, strict=True)
        ],
        dtype=torch.float64,
    )
    of_times = {
        "flow_matching_loss": sums["sum_error_with"] / count_M,
        "flow_matching_loss_without_context": sums["sum_error_without"] / count_M,
        "linear_predictor_loss": linear_M,
    }
    if "sum_error_shuffled" in sums:
        of_times["flow_matching_loss_shuffled_context"] = sums["sum_error_shuffled"] / count_M
    metrics = {name: loss_M.nanmean().item() for name, loss_M in of_times.items()}
    channels, total = len(mean_C), matrices.sum(0)
    u = slice(1 + channels, None)
    metrics["constant_predictor_loss"] = constant_predictor_loss(
        total[0, u], total[u, u].diagonal().sum().item(), int(total[0, 0])
    )
    gain_M = of_times["flow_matching_loss_without_context"] - of_times["flow_matching_loss"]
    metrics["context_gain"] = gain_M.nanmean().item()
    metrics["context_information"] = channels * (gain_M * (1 - times) / times).nanmean().item()
    metrics |= _standard_errors(sums["sum_samples"].item(), sums["sum_spread"])
    metrics["flow_matching_loss_training_times"] = (sums["sum_error_training"] / total[0, 0]).item()
    for name in ("flow_matching_loss", "flow_matching_loss_without_context", "linear_predictor_loss"):
        for index, loss in enumerate(of_times[name].view(TIME_BINS, -1).nanmean(1).tolist()):
            if not math.isnan(loss):
                metrics[f"{name}_bin_{index}"] = loss
    return metrics


def _standard_errors(samples: float, sums_6: torch.Tensor) -> dict[str, float]:
    if samples < 2:
        return {}
    names, (sums_3, squares_3) = ("flow_matching_loss", "context_gain", "context_information"), sums_6.view(2, 3)
    variance_3 = (squares_3 - sums_3.square() / samples).clamp(min=0) / (samples - 1)
    return {
        f"{name}_standard_error": error
        for name, error in zip(names, (variance_3 / samples).sqrt().tolist(), strict=True)
    }
