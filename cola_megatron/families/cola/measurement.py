"""What a held-out measurement of Cola DLM computes, and the figures that follow."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from cola_megatron.config import ColaConfig
from cola_megatron.families.cola.chain import Cola
from cola_megatron.families.cola.measured_steps import ROBUSTNESS_TIMES, measured_steps
from cola_megatron.families.cola.posterior_statistics import posterior_metrics, posterior_shapes
from cola_megatron.families.cola.prior_metrics import prior_metrics, sum_shapes
from cola_megatron.families.cola.velocity_passes import fixed_draws
from cola_megatron.families.family import Measurement
from cola_megatron.models.steps import Step
from cola_megatron.objectives import vae


class ColaMeasurement(Measurement):
    """Reconstruction, the posterior, and in stage 2 the prior beside its baselines.

    Args:
        shuffled_context: also predicts with the context of another sample; needs a micro-batch of two or more.
        posterior_statistics: also what `posterior_metrics` returns, several numbers for every latent dimension.
    """

    batch_names = ("posterior_noise", "flow_noise", "time", "fixed_time")

    def __init__(self, config: ColaConfig, shuffled_context: bool = False, posterior_statistics: bool = False):
        self.config, self.shuffled_context, self.posterior_statistics = config, shuffled_context, posterior_statistics

    def fixed_draws(self, samples: Sequence[int]) -> dict[str, NDArray[Any]]:
        """Noise and times; see `velocity_passes.fixed_draws`."""
        return {**fixed_draws(self.config, list(samples))}

    def steps(self, model: Cola) -> list[Step]:
        """See `measured_steps.measured_steps`."""
        return measured_steps(model, self.config, self.shuffled_context, self.posterior_statistics)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the sums over times, moments and samples."""
        return {"sum_accuracy_spread": (3,), **sum_shapes(self.config), **posterior_shapes(self.config)}

    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """`reconstruction_accuracy` of the posterior mean, with its `_standard_error` over samples, and
        `reconstruction_accuracy_t250`, `_t500` of the latent at flow time 0.25, 0.5; `reconstruction_nll`;
        `vae_logsnr` where there is a variance; in stage 2 what `prior_metrics` returns.
        """
        tokens = sums["sum_tokens"].item()
        metrics = {"reconstruction_nll": sums["sum_nll"].item() / tokens}
        for t in ROBUSTNESS_TIMES:
            name = f"t{round(1000 * t)}"
            suffix = f"_{name}" if t else ""
            metrics[f"reconstruction_accuracy{suffix}"] = sums[f"sum_correct_{name}"].item() / tokens
        count, total, squares = sums["sum_accuracy_spread"].tolist()
        if count >= 2:
            variance = max(0.0, squares - total**2 / count) / (count - 1)
            metrics["reconstruction_accuracy_standard_error"] = math.sqrt(variance / count)
        if "sum_variance" in sums:
            metrics["vae_logsnr"] = vae.measured_logsnr(sums["sum_mean_square"].item(), sums["sum_variance"].item())
        if "sum_mean_moments" in sums:
            metrics |= posterior_metrics(sums)
        if "sum_moments" in sums:
            metrics |= prior_metrics(sums)
        return metrics
