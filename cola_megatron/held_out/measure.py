"""Held-out measurements of a model in training. Draws are fixed, so that measurements of one run compare.

Shapes as in `models/cola.py`.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from cola_megatron.config import RunConfig
from cola_megatron.data import SampleSequence, TokenShards, held_out_samples
from cola_megatron.held_out.measured_steps import ROBUSTNESS_TIMES, TIME_BINS, measured_steps
from cola_megatron.models.cola import Cola
from cola_megatron.models.steps import run_steps
from cola_megatron.objectives import flow_matching, vae
from cola_megatron.objectives.randomness import draw_times, generator
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
) -> dict[str, float]:
    """Measures on the first held-out sequences of every source, the same ones each time and in any layout.

    Args:
        on_batch: called after every micro-batch.

    Returns:
        `reconstruction_accuracy` (of the posterior mean) and `reconstruction_accuracy_t250`, `_t500` (of the latent
        at flow time 0.25, 0.5), `reconstruction_nll`, `vae_logsnr` (where there is a variance); in stage 2
        `flow_matching_loss`, `constant_predictor_loss` (both at the training distribution of t) and
        `flow_matching_loss_bin_<i>` over equal bins of t in [0, 1]. The same on every rank.
    """
    model.eval()
    samples, micro = min(config.training.evaluation.samples, len(shards)), config.training.micro_batch_size
    # Every replica runs as many batches of one size (ZeRO 3 gathers parameters in step); the rest weighs nothing.
    batches = -(-samples // (micro * groups.data_parallel_size))
    held_out = held_out_samples(shards, skip_bad=config.data.bad_shards == "skip")
    inputs = _micro_batches(held_out, config, groups, samples, batches)
    chain = measured_steps(model, config)
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

    forward_only(Neighbours(groups, stage.takes, stage.hands_on), batches, forward)
    model.train()
    return _metrics(_over_the_job(sums, results, config, groups), config)


BATCH_NAMES = {"tokens", "counted", "documents", "weight", "posterior_noise", "flow_noise", "time", "uniform_time"}


def _micro_batches(
    held_out: SampleSequence, config: RunConfig, groups: ProcessGroups, samples: int, batches: int
) -> Iterator[Tensors]:
    """This replica's share of the samples: tokens, weights (0: a filler), and every draw, on the device."""
    micro = config.training.micro_batch_size
    latents, channels = config.latent_length, config.model.vae.latent_dim
    blocks = latents // config.model.dit.block_size
    for batch in range(batches):
        first = (batch * groups.data_parallel_size + groups.data_parallel_rank) * micro
        wanted = range(first, first + micro)
        ids = [sample if sample < samples else 0 for sample in wanted]

        def draw(purpose: str, ids: list[int] = ids) -> np.ndarray:
            streams = [generator(config.seed, f"evaluation {purpose}", sample, 0) for sample in ids]
            return np.stack([stream.standard_normal((latents, channels), np.float32) for stream in streams], axis=1)

        texts = [
            positions(next(held_out.read(sample, 1)).tokens, held_out.padding_id, held_out.end_of_text_id)
            for sample in ids
        ]
        arrays = {
            **{name: np.stack([sample[name] for sample in texts]) for name in texts[0]},
            "weight": np.array([sample < samples for sample in wanted], dtype=np.float64),
            "flow_noise": draw("flow"),
        }
        if config.stage == 2:
            streams = [generator(config.seed, "evaluation time", sample, 0) for sample in ids]
            arrays["posterior_noise"] = draw("posterior")
            arrays["time"] = np.stack([draw_times(stream, config.objective.flow.time, blocks) for stream in streams])
            arrays["uniform_time"] = np.stack([stream.random(blocks, dtype=np.float32) for stream in streams])
        yield {name: torch.from_numpy(array).to(groups.device) for name, array in arrays.items()}


def _over_the_job(sums: Tensors, names: list[str], config: RunConfig, groups: ProcessGroups) -> dict[str, torch.Tensor]:
    """Adds up stages and replicas; each sum is made in one stage."""
    sizes = {"sum_target": config.model.vae.latent_dim} | dict.fromkeys(("sum_bin_error", "sum_bin_count"), TIME_BINS)
    flat = [
        sums[name].double().reshape(-1)
        if name in sums
        else torch.zeros(sizes.get(name, 1), dtype=torch.float64, device=groups.device)
        for name in names
    ]
    total = groups.sum_over_stages_and_replicas(torch.cat(flat)).cpu()
    return dict(zip(names, total.split([part.numel() for part in flat]), strict=True))


def _metrics(sums: dict[str, torch.Tensor], config: RunConfig) -> dict[str, float]:
    tokens, latents = sums["sum_tokens"].item(), sums["sum_latents"].item()
    metrics = {"reconstruction_nll": sums["sum_nll"].item() / tokens}
    for t in ROBUSTNESS_TIMES:
        name = f"t{round(1000 * t)}"
        suffix = f"_{name}" if t else ""
        metrics[f"reconstruction_accuracy{suffix}"] = sums[f"sum_correct_{name}"].item() / tokens
    if "sum_variance" in sums:
        metrics["vae_logsnr"] = vae.measured_logsnr(sums["sum_mean_square"].item(), sums["sum_variance"].item())
    if "sum_flow" in sums:
        metrics["flow_matching_loss"] = sums["sum_flow"].item() / latents
        metrics["constant_predictor_loss"] = flow_matching.constant_predictor_loss(
            sums["sum_target"], sums["sum_target_square"].item(), int(latents)
        )
        for index, (error, count) in enumerate(zip(sums["sum_bin_error"], sums["sum_bin_count"], strict=True)):
            if count:
                metrics[f"flow_matching_loss_bin_{index}"] = (error / count).item()
    return metrics
