"""Held-out measurements of a model. Samples and draws are fixed, so that measurements and runs compare."""

import math
from collections.abc import Callable, Collection, Iterator

import numpy as np
import torch

from cola_megatron.config import RunConfig
from cola_megatron.data import SampleSequence, TokenShards, held_out_samples
from cola_megatron.families import Measurement, family_of
from cola_megatron.models.compiled_blocks import uncompiled
from cola_megatron.models.pipelined import PipelinedModel
from cola_megatron.models.steps import run_steps
from cola_megatron.objectives.samples import positions
from cola_megatron.parallel import ProcessGroups
from cola_megatron.parallel.pipeline import Neighbours, Tensors, forward_only


@torch.no_grad()
def evaluate(
    model: PipelinedModel,
    shards: TokenShards,
    config: RunConfig,
    groups: ProcessGroups,
    on_batch: Callable[[], None] = lambda: None,
    extras: Collection[str] = (),
) -> dict[str, float]:
    """Measures on held-out sequences spread over every source: the same ones each time, in any run and any layout.

    Args:
        on_batch: called after every micro-batch.
        extras: what else to measure: names of `Family.extras`.

    Returns:
        `samples`, how many sequences were measured, and the figures of the family. The same on every rank.
    """
    model.eval()
    samples, micro = min(config.training.evaluation.samples, len(shards)), config.training.micro_batch_size
    # Every replica runs as many batches of one size (ZeRO 3 gathers parameters in step); the rest weighs nothing.
    batches = -(-samples // (micro * groups.data_parallel_size))
    held_out = held_out_samples(shards, skip_bad=config.data.bad_shards == "skip")
    measurement = family_of(config).measurement(config, extras)
    inputs = _micro_batches(held_out, measurement, config, groups, samples, batches)
    chain = measurement.steps(model)
    results = [name for step in chain for name in step.writes if name.startswith("sum_")]
    stage = model.own_stage_of(chain, BATCH_NAMES | set(measurement.batch_names), results)
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
    whole = _over_the_job(sums, results, measurement, groups)
    return {"samples": float(samples), **measurement.metrics(whole)}


BATCH_NAMES = {"tokens", "counted", "documents", "weight"}


def _micro_batches(
    held_out: SampleSequence,
    measurement: Measurement,
    config: RunConfig,
    groups: ProcessGroups,
    samples: int,
    batches: int,
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
            **measurement.fixed_draws(numbers),
        }
        yield {name: torch.from_numpy(array).to(groups.device) for name, array in arrays.items()}


def _over_the_job(
    sums: Tensors, names: list[str], measurement: Measurement, groups: ProcessGroups
) -> dict[str, torch.Tensor]:
    """Adds up stages and replicas; each sum is made in one stage, and alike on all ranks of a context."""
    shapes = measurement.shapes
    flat = [
        sums[name].double().reshape(-1)
        if name in sums
        else torch.zeros(math.prod(shapes.get(name, ())), dtype=torch.float64, device=groups.device)
        for name in names
    ]
    whole = groups.sum_over_stages_and_replicas(torch.cat(flat)).cpu() / groups.context_parallel_size
    parts = whole.split([part.numel() for part in flat])
    return {name: part.view(shapes.get(name, ())) for name, part in zip(names, parts, strict=True)}
