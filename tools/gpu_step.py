"""Speed and memory of training the published model on one device, with each switch of the config turned off in turn."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping

import torch

from cola_megatron.config import RunConfig
from cola_megatron.families import family_of
from cola_megatron.planning.flops import training_flops_per_sample
from cola_megatron.planning.memory import rank_memory
from cola_megatron.planning.split import pipeline_split
from cola_megatron.training.engine import Engine
from tools.gpu_setting import Record, Setting, forget_compiled, peak_gib, reset_peak, seconds_of, synchronize
from tools.gpu_training import fresh_engine, of_peak, synthetic_batches

ACCUMULATION = 3

ONE_OF_EIGHT = 22
"""Micro-batches of 8 that one of 8 GPUs computes of the published batch of 1,408."""

SWITCHES: Mapping[str, tuple[str, ...]] = {
    "without_compile": ("training.compile_blocks=never",),
    "without_loss_chunks": ("training.loss_chunk_tokens=0",),
    "attention_in_chunks": ("training.attention_chunk=256",),
    "muon": ("training.optimizer.name=muon",),
}
"""Name -> overrides that turn one thing off, or on that has not been measured on a GPU."""

OTHER_FAMILIES = ("autoregressive", "masked-diffusion", "plaid")
"""As the names of their presets end."""

SIZES = (8, 16)
"""Micro-batches; the preset's own first, for a run that is cut off should have had it."""
SIZES_ON_A_CPU = (1, 2)
"""Where only the logic is tested."""


def check_step(
    setting: Setting,
    name: str,
    overrides: tuple[str, ...] = (),
    sweep: bool = False,
    accumulation: int = ACCUMULATION,
    family: str = "",
) -> Iterator[Record]:
    """A step under ZeRO 1 in bfloat16; `sweep` measures all sizes on one engine, otherwise the first alone.

    Args:
        family: one of `OTHER_FAMILIES`; empty: stage 2 of Cola DLM.
    """
    preset = f"{setting.large_preset}-{family}" if family else setting.large_preset
    all_sizes = SIZES if setting.on_gpu else SIZES_ON_A_CPU
    sizes = all_sizes if sweep else all_sizes[:1]
    accumulation = accumulation if setting.on_gpu else ACCUMULATION
    began = time.perf_counter()
    with fresh_engine(step_config(setting, preset, sizes[0], overrides, accumulation), setting.groups) as engine:
        synchronize(setting)
        start = time.perf_counter() - began
        for size in sizes:
            config = step_config(setting, preset, size, overrides, accumulation)
            needed = planned_peak(config)
            if not setting.fits(needed):
                detail = f"left out: by the plan it needs {needed / 2**30:.1f} GiB"
                yield Record(f"{name}.micro{size}", True, None, "", detail)
                continue
            forget_compiled()  # each size has its own graphs, and torch keeps no more than a few for a layer
            yield from measured(setting, f"{name}.micro{size}", engine, config, start)


def measured(setting: Setting, name: str, engine: Engine, config: RunConfig, start: float) -> Iterator[Record]:
    """One micro-batch size on an engine; `start` is how long that took to build."""
    size, repeats = config.training.micro_batch_size, 3 if setting.quick else 5
    steps = 1 if setting.quick else 3
    batches = synthetic_batches(config, min(ACCUMULATION, engine.accumulation), setting.device)
    began = time.perf_counter()
    losses = [engine.step(batches, 0)["loss"]]
    first = time.perf_counter() - began
    reset_peak(setting)
    began = time.perf_counter()
    losses += [engine.step(batches, 1 + step)["loss"] for step in range(steps)]
    synchronize(setting)
    seconds, memory = (time.perf_counter() - began) / steps, peak_gib(setting)
    reserved = torch.cuda.memory_reserved(setting.device) / 2**30 if setting.on_gpu else 0.0

    batch = next(batches)

    def forward_and_backward() -> None:
        engine.model(batch)["loss"].backward()
        for parameter in engine.model.parameters():
            parameter.grad = None

    one = seconds_of(setting, forward_and_backward, repeats)
    engine.deepspeed.optimizer.zero_grad()  # fused weight gradients went into the sums of the next step
    ok = all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    flops, peak = size * training_flops_per_sample(config), setting.peak_flops
    tokens = size * config.data.sequence_length
    detail = (
        f"{config.name}, {family_of(config).describe(config)}, bf16, ZeRO 1, {size} sequences of "
        f"{config.data.sequence_length} tokens; "
        f"engine there after {start:.1f} s, first step {first:.1f} s; loss {losses[0]:.4f} -> {losses[-1]:.4f}"
    )
    yield Record(f"{name}.forward_backward", ok, one * 1e3, "ms", detail)
    utilisation = flops / one / peak if peak else None
    yield Record(f"{name}.utilisation", ok, utilisation, "of bf16 peak", of_peak(setting, flops / one))
    accumulation = engine.accumulation
    detail = f"{accumulation} micro-batches and the update; {accumulation * tokens / seconds:,.0f} tokens/s"
    yield Record(f"{name}.step", ok, seconds * 1e3, "ms", detail)
    rate = accumulation * flops / seconds
    yield Record(f"{name}.step_utilisation", ok, rate / peak if peak else None, "of bf16 peak", of_peak(setting, rate))
    planned = planned_peak(config) / 2**30
    detail = f"peak of what torch allocated in the steps; with what it holds back {reserved:.1f} GiB"
    yield Record(f"{name}.memory", ok, memory, "GiB", detail)
    ratio = None if memory is None else memory / planned
    yield Record(f"{name}.memory_of_plan", ok, ratio, "of the plan", f"`cola plan` says {planned:.2f} GiB")


def step_config(
    setting: Setting, preset: str, micro_batch: int, overrides: tuple[str, ...], accumulation: int
) -> RunConfig:
    """The preset with a batch of so many micro-batches."""
    sizes = (
        f"training.micro_batch_size={micro_batch}",
        f"training.global_batch_size={accumulation * micro_batch}",
        "parallel.zero_stage=1",
    )
    return setting.config(preset, *sizes, *overrides)


def planned_peak(config: RunConfig) -> float:
    """Bytes that `cola plan` says one rank needs."""
    return max(stage.peak for stage in rank_memory(config, 1, pipeline_split(config)))
