"""Checks of training: speed and memory of its steps, and resuming from a checkpoint."""

from __future__ import annotations

import contextlib
import itertools
import math
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from cola_megatron.checkpoint.compatible import check_checkpoint
from cola_megatron.checkpoint.load import load_optimizer, load_weights, read_weights
from cola_megatron.checkpoint.writer import save_checkpoint
from cola_megatron.config import RunConfig
from cola_megatron.families.samples import training_sample
from cola_megatron.parallel import ProcessGroups
from cola_megatron.planning.flops import training_flops_per_sample
from cola_megatron.training.engine import Engine
from tools.gpu_setting import (
    Record,
    Setting,
    machine,
    peak_gib,
    random_model,
    release_memory,
    reset_peak,
    synchronize,
)


def check_training(setting: Setting, stage: int, zero_stage: int) -> Iterator[Record]:
    """Speed, utilisation and memory of optimiser steps on one batch, whose loss must fall."""
    config = setting.config(setting.preset, f"stage={stage}", f"parallel.zero_stage={zero_stage}")
    warm_up, measured = (1, 2) if setting.quick else (2, 5)
    with fresh_engine(config, setting.groups) as engine:
        batches = synthetic_batches(config, engine.accumulation, setting.device)
        first, *_ = [engine.step(batches, step) for step in range(warm_up)]
        reset_peak(setting)
        began = time.perf_counter()
        metrics = [engine.step(batches, warm_up + step) for step in range(measured)]
        synchronize(setting)
        seconds, memory = (time.perf_counter() - began) / measured, peak_gib(setting)
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters())
    samples, length = config.training.global_batch_size, config.data.sequence_length
    losses = first["loss"], metrics[-1]["loss"]
    norms_are_finite = all(math.isfinite(step["gradient_norm"]) for step in [first, *metrics])
    ok = norms_are_finite and all(map(math.isfinite, losses)) and losses[1] < losses[0]
    name = f"train.stage{stage}.zero{zero_stage}"
    detail = (
        f"{setting.preset}, {parameters:,} parameters, bf16, {samples} sequences of {length} tokens a step, "
        f"micro-batch {config.training.micro_batch_size}, {measured} steps after {warm_up}, synthetic batches on the "
        f"device; loss {losses[0]:.4f} -> {losses[1]:.4f}"
    )
    rate, peak = training_flops_per_sample(config) * samples / seconds, setting.peak_flops
    yield Record(f"{name}.speed", ok, samples * length / seconds, "tokens/s", detail)
    yield Record(f"{name}.utilisation", ok, rate / peak if peak else None, "of bf16 peak", of_peak(setting, rate))
    yield Record(f"{name}.memory", ok, memory, "GiB", "largest of what torch had allocated during the measured steps")


def of_peak(setting: Setting, rate: float) -> str:
    """A rate of model FLOPs beside the peak of the device, in words."""
    if setting.peak_flops is None:
        found = machine(setting.device.type)
        return f"no bfloat16 peak in the table for {found}; {rate / 1e12:.4g} TFLOP/s of model FLOPs"
    return f"{rate / 1e12:.1f} of {setting.peak_flops / 1e12:.0f} TFLOP/s; model FLOPs, recomputation not counted"


def check_resume(setting: Setting, zero_stage: int) -> Iterator[Record]:
    """2 n steps against n, a checkpoint, a new engine and n more: the largest difference of a weight."""
    preset, half = "small" if setting.on_gpu else "tiny", 1 if setting.quick else 2
    with tempfile.TemporaryDirectory() as folder:
        config = setting.config(preset, f"parallel.zero_stage={zero_stage}", f"runs_folder={folder}")
        with reproducible():
            straight = steps_from(setting, config, 0, 2 * half)
            steps_from(setting, config, 0, half)
            resumed = steps_from(setting, config, half, 2 * half)
            difference = largest_difference(straight, resumed)
            detail = f"{preset}, stage 2, bf16, {half} + {half} steps; 0 is bit for bit"
            if difference:
                again = largest_difference(straight, steps_from(setting, config, 0, 2 * half))
                detail += f"; two uninterrupted runs differ by {again:.1e}"
    yield Record(f"resume.zero{zero_stage}", difference == 0.0, difference, "largest difference", detail)


def steps_from(setting: Setting, config: RunConfig, start: int, end: int) -> dict[str, torch.Tensor]:
    """Whole weights of the checkpoint after steps start .. end - 1; from that of `start` where it is not 0."""
    fingerprint, checkpoint = "synthetic", None
    if start:
        checkpoint = config.run_folder / "checkpoints" / f"step_{start:08d}"
        found = check_checkpoint(checkpoint, config, fingerprint)
        if found != start:
            raise RuntimeError(f"{checkpoint} says step {found}")
    with fresh_engine(config, setting.groups, checkpoint) as engine:
        for step in range(start, end):
            engine.step(synthetic_batches(config, engine.accumulation, setting.device, step), step)
        return read_weights(save_checkpoint(engine, end, fingerprint, setting.groups))[1]


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Over all weights of two models; NaN counts as different."""
    differences = [(first[name] - second[name]).abs().max().nan_to_num(nan=math.inf).item() for name in first]
    return max(differences)


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """Kernels that sum in the same order every time, where torch has them."""
    deterministic: Any = torch.utils.deterministic  # whose property appears when torch is imported
    before, fill = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic.fill_uninitialized_memory = False  # would write DeepSpeed's buckets for each engine
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
            deterministic.fill_uninitialized_memory = fill


@contextlib.contextmanager
def fresh_engine(config: RunConfig, groups: ProcessGroups, checkpoint: Path | None = None) -> Iterator[Engine]:
    """The engine that training uses, on starting weights or as a checkpoint has it."""
    release_memory()
    model = random_model(config, groups)
    if checkpoint is not None:
        load_weights(model, checkpoint, groups)
    engine = Engine(model, config, groups)
    del model
    if checkpoint is not None:
        load_optimizer(engine, checkpoint)
    try:
        yield engine
    finally:
        engine.close()


def synthetic_batches(
    config: RunConfig, count: int, device: torch.device, step: int = 0
) -> Iterator[dict[str, torch.Tensor]]:
    """`count` micro-batches of random tokens with the draws of training, on the device, over and over."""
    size = config.training.micro_batch_size
    micro_batches = []
    for number in range(count):
        rows = []
        for index in range(number * size, (number + 1) * size):
            random = np.random.default_rng([index, step])
            tokens = random.integers(0, config.model.vocab_size, config.data.sequence_length)
            rows.append(training_sample(config, tokens, -1, -1, index, step))
        micro_batches.append(
            {name: torch.from_numpy(np.stack([row[name] for row in rows])).to(device) for name in rows[0]}
        )
    return itertools.cycle(micro_batches)
