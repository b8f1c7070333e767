"""Held-out measurements of a model. Samples and draws are fixed, so that measurements and runs compare.

Shapes as in `models/cola.py`.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from cola_megatron.config import RunConfig
from cola_megatron.data import SampleSequence, TokenShards, held_out_samples
from cola_megatron.held_out.measured_steps import ROBUSTNESS_TIMES, measured_steps
from cola_megatron.held_out.posterior_statistics import posterior_metrics, posterior_shapes
from cola_megatron.held_out.prior_metrics import prior_metrics, sum_shapes
from cola_megatron.held_out.velocity_passes import fixed_draws
from cola_megatron.models.cola import Cola
from cola_megatron.models.compiled_blocks import uncompiled
from cola_megatron.models.steps import run_steps
from cola_megatron.objectives import vae
from cola_megatron.objectives.samples import positions
from cola_megatron.parallel import ProcessGroups
from cola_megatron.parallel.pipeline import Neighbours, Tensors, forward_only


@torch.no_grad()
def evaluate(
    model: Cola,
    shards: TokenShards,
    config: RunConfig,
    groups: ProcessGroups,
    on_batch: Callable[[], None] = lambda: None,
    shuffled_context: bool = False,
    posterior_statistics: bool = False,
) -> dict[str, float]:
    """Measures on held-out sequences spread over every source: the same ones each time, in any run and any layout.

    Args:
        on_batch: called after every micro-batch.
        shuffled_context: also predicts with the context of another sample; needs a micro-batch of two or more.
        posterior_statistics: also what `posterior_metrics` returns, several numbers for every latent dimension.

    Returns:
        `samples`, how many sequences were measured; `reconstruction_accuracy` (of the posterior mean; with a
        `_standard_error` over samples) and
        `reconstruction_accuracy_t250`, `_t500` (of the latent at flow time 0.25, 0.5), `reconstruction_nll`,
        `vae_logsnr` (where there is a variance); in stage 2 what `prior_metrics` returns. The same on every rank.
    """
    model.eval()
    samples, micro = min(config.training.evaluation.samples, len(shards)), config.training.micro_batch_size
    # Every replica runs as many batches of one size (ZeRO 3 gathers parameters in step); the rest weighs nothing.
    batches = -(-samples // (micro * groups.data_parallel_size))
    held_out = held_out_samples(shards, skip_bad=config.data.bad_shards == "skip")
    inputs = _micro_batches(held_out, config, groups, samples, batches)
    chain = measured_steps(model, config, shuffled_context, posterior_statistics)
    results = [name for step in chain for name in step.writes if name.startswith("sum_")]
    stage = model.own_stage_of(chain, BATCH_NAMES, results)
    sums: Tensors = {}

    def forward(taken: Tensors) -> Tensors:
        state = run_steps(stage.steps, {**next(inputs), **taken}, keep=stage.hands_on)
        for name in results:
            if name in state:
                sums[name] = sums[name] + state[name] if name in sums else state[name]
        on_batch()
        return {name: state[name] for name in stage.hands_on}

    with uncompiled():
        forward_only(Neighbours(groups, stage.takes, stage.hands_on), batches, forward)
    model.train()
    return _metrics(_over_the_job(sums, results, config, groups), config, samples)


BATCH_NAMES = {"tokens", "counted", "documents", "weight", "posterior_noise", "flow_noise", "time", "fixed_time"}


def _micro_batches(
    held_out: SampleSequence, config: RunConfig, groups: ProcessGroups, samples: int, batches: int
) -> Iterator[Tensors]:
    """This replica's share of the samples: tokens, weights (0: a filler), and every draw, on the device."""
    micro = config.training.micro_batch_size
    for batch in range(batches):
        first = (batch * groups.data_parallel_size + groups.data_parallel_rank) * micro
        places = [place if place < samples else 0 for place in range(first, first + micro)]
        texts = [
            positions(next(held_out.read(place, 1)).tokens, held_out.padding_id, held_out.end_of_text_id)
            for place in places
        ]
        numbers = [int(held_out.order.sample_ids(place, 1)[0]) for place in places]
        arrays = {
            **{name: np.stack([sample[name] for sample in texts]) for name in texts[0]},
            "weight": np.array([place < samples for place in range(first, first + micro)], dtype=np.float64),
            **fixed_draws(config, numbers),
        }
        yield {name: torch.from_numpy(array).to(groups.device) for name, array in arrays.items()}


def _over_the_job(sums: Tensors, names: list[str], config: RunConfig, groups: ProcessGroups) -> dict[str, torch.Tensor]:
    """Adds up stages and replicas; each sum is made in one stage."""
    shapes = {"sum_accuracy_spread": (3,), **sum_shapes(config), **posterior_shapes(config)}
    flat = [
        sums[name].double().reshape(-1)
        if name in sums
        else torch.zeros(math.prod(shapes.get(name, ())), dtype=torch.float64, device=groups.device)
        for name in names
    ]
    whole = groups.sum_over_stages_and_replicas(torch.cat(flat)).cpu()
    parts = whole.split([part.numel() for part in flat])
    return {name: part.view(shapes.get(name, ())) for name, part in zip(names, parts, strict=True)}


def _metrics(sums: dict[str, torch.Tensor], config: RunConfig, samples: int) -> dict[str, float]:
    tokens = sums["sum_tokens"].item()
    metrics = {"samples": float(samples), "reconstruction_nll": sums["sum_nll"].item() / tokens}
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
