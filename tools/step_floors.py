"""The least time that each part of a step can take: its FLOPs and bytes over what the device was measured to do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from cola_megatron.config import RunConfig
from cola_megatron.costs.part import ATTENTION_PASSES, MATRIX_PASSES, Part
from cola_megatron.families import family_of
from cola_megatron.parallel import ProcessGroups
from cola_megatron.planning.hardware import GPUS, Efficiency
from cola_megatron.planning.memory import micro_batches
from cola_megatron.planning.split import pipeline_split
from cola_megatron.planning.step_time import optimizer_seconds, step_time
from cola_megatron.preflight.cluster import measure_all_reduce


@dataclass(frozen=True)
class Rates:
    """What this process's device was measured to do."""

    product: float
    """FLOP/s of a large matrix product in the config's precision."""
    copy: float
    """Bytes/s read and written by a copy."""
    link: float | None
    """Bytes/s that each rank sends in an all-reduce over all ranks; None in a job of one."""


@dataclass
class Floor:
    """Seconds of a part in one optimiser step, on one rank. In one stream neither sort hides the other."""

    products: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Floor) -> Floor:
        return Floor(self.products + other.products, self.bytes + other.bytes)


def measure_rates(config: RunConfig, groups: ProcessGroups) -> Rates:
    """All ranks call it."""
    on_gpu = groups.device.type == "cuda"
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    size, count = (8192, 2**29) if on_gpu else (512, 2**23)
    a, b = (torch.randn(size, size, device=groups.device, dtype=dtype) for _ in range(2))
    source = torch.zeros(count, device=groups.device)
    target = torch.empty_like(source)
    return Rates(
        product=2 * size**3 / _median(lambda: a @ b, on_gpu),
        copy=2 * source.nbytes / _median(lambda: target.copy_(source), on_gpu),
        link=measure_all_reduce(groups) if groups.world_size > 1 else None,
    )


def _median(work: Callable[[], object], on_gpu: bool) -> float:
    times = []
    for _ in range(12):
        began = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def floors(config: RunConfig, groups: ProcessGroups, rates: Rates) -> dict[str, Floor]:
    """Floors of this rank's parts over the micro-batches of one step, by the labels of `step_profile`.

    Products: matrices forward and twice backward, the attention pairs that the mask keeps 3.5 times; once more where
    blocks are recomputed. Bytes: what autograd keeps is written once and read once. The optimiser's are those of
    `cola plan`.
    """
    replicas, split = groups.data_parallel_size, pipeline_split(config, groups.data_parallel_size)
    first = sum(split[: groups.pipeline_parallel_rank])
    own = family_of(config).parts(config)[first : first + split[groups.pipeline_parallel_rank]]
    found: dict[str, Floor] = {}
    for part in own:
        for label, floor in _floors_of(config, part, rates).items():
            found[label] = found.get(label, Floor()) + floor
    count = micro_batches(config, replicas)
    found = {label: Floor(count * floor.products, count * floor.bytes) for label, floor in found.items()}
    found["optimizer"] = Floor(bytes=_optimizer_floor(config, own, replicas, rates))
    if rates.link is not None:
        gpu, efficiency = GPUS["h100"], Efficiency()  # the bytes do not depend on them
        sent = step_time(config, replicas, split, gpu, efficiency, groups.world_size).sent
        found["communication"] = Floor(bytes=sent / rates.link)
    return found


def _optimizer_floor(config: RunConfig, parts: Sequence[Part], replicas: int, rates: Rates) -> float:
    device = replace(GPUS["h100"], memory_bandwidth=rates.copy)
    return optimizer_seconds(config, parts, replicas, device, replace(Efficiency(), memory=1.0))


def _floors_of(config: RunConfig, part: Part, rates: Rates) -> dict[str, Floor]:
    """Of one micro-batch: the part, and for a block its branches."""
    if not part.forward:
        return {}
    is_block = part.is_block
    recomputed = part.runs_again(config)
    matrix_passes, attention_passes = (
        (passes if part.backward else 1.0) + recomputed for passes in (MATRIX_PASSES, ATTENTION_PASSES)
    )
    flops = 2 * config.training.micro_batch_size / config.parallel.tensor_parallel_size

    def products(matrix: float, attention: float = 0.0) -> Floor:
        return Floor(flops * (matrix * matrix_passes + attention * attention_passes) / rates.product)

    whole = products(part.matrix_macs, part.attention_macs)
    if part.backward:
        whole.bytes = 2 * part.activations.kept / rates.copy
    if not is_block:
        return {part.label: whole}
    projections = part.matrix_macs - part.feed_forward_macs - part.modulation_macs
    return {
        part.label: whole,
        f"{part.label}.attention": products(projections, part.attention_macs),
        f"{part.label}.feed_forward": products(part.feed_forward_macs),
        f"{part.label}.rest": products(part.modulation_macs),
    }
