"""The checks of `tools.gpu_check`: each is a function of a `Setting` and returns its records."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import math
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from cola_megatron.config import RunConfig, load_config
from cola_megatron.inference.generate import GeneratedBlocks, GenerationSettings, generate_blocks
from cola_megatron.interface import ColaDLM
from cola_megatron.models.cola import Cola
from cola_megatron.objectives.randomness import sample_draws
from cola_megatron.parallel import (
    ProcessGroups,
    gather_state_dict,
    initialize_parameters,
    load_full_state_dict,
)
from cola_megatron.scaling.flops import training_flops_per_sample
from cola_megatron.training.checkpoint import check_checkpoint, load_checkpoint, save_checkpoint
from cola_megatron.training.engine import Engine
from cola_megatron.training.versions import versions

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "data" / "reference_tiny"

# The golden numbers and ours are both float32 and round differently: the golden ones are up to 6e-6 of a tensor's
# largest magnitude away from the same model in float64, and another float32 evaluation may be as far on the other side.
FP32_TOLERANCE = 2e-5
# Rounding to bfloat16 is wrong by 2^-8 at most, and by 2^-8 / sqrt(3) in the root mean square. Independent roundings in
# series add in squares; the network passes them on roughly as they are, with a factor 2 for what it amplifies.
BF16_ROUNDING = 2**-8 / math.sqrt(3)
BF16_AMPLIFICATION = 2.0
ROUNDINGS_PER_BLOCK, ROUNDINGS_AT_THE_ENDS = 16, 8
# Tokens of the first prompt that the published package generated at the right positions; see tests/test_golden.py.
GOLDEN_TOKENS = 24

# Dense bfloat16 peak of the tensor cores in FLOP/s, from the vendor's data sheets; the first name that fits counts.
BF16_PEAKS = (
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH(100|200) NVL\b", 835e12),
    (r"\bH(100|200)\b", 989e12),
    (r"\bA100\b", 312e12),
    (r"\bB200\b", 2250e12),
)


@dataclass(frozen=True)
class Record:
    """One figure of one check."""

    name: str
    ok: bool
    value: float | None
    """None: not measured here, or the check failed before there was a figure."""
    unit: str
    detail: str


@dataclass(frozen=True)
class Setting:
    """What the checks run on, and at which size."""

    groups: ProcessGroups
    quick: bool

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.groups.device

    @property
    def on_gpu(self) -> bool:
        """Whether figures mean something: on the CPU only the logic of the checks is tested."""
        return self.device.type == "cuda"

    @property
    def preset(self) -> str:
        """Preset whose model is measured."""
        return "base" if self.on_gpu else "tiny"

    def config(self, preset: str, *overrides: str) -> RunConfig:
        """A preset with a batch of a few micro-batches and no warm-up; on the CPU also with short sequences."""
        if self.on_gpu:
            micro_batch = load_config(preset).training.micro_batch_size
            shape = [f"training.global_batch_size={(2 if self.quick else 4) * micro_batch}"]
        else:
            shape = ["training.global_batch_size=4", "training.micro_batch_size=2", "data.sequence_length=32"]
        return load_config(preset, [*shape, "training.precision=bf16", "training.schedule.warmup_steps=0", *overrides])


Check = Callable[[Setting], list[Record]]


# ---- what runs here -------------------------------------------------------------------------------------------------


def check_device(setting: Setting) -> list[Record]:
    """The machine and its software; the value is the device's memory."""
    found = ", ".join(f"{name} {version}" for name, version in software().items())
    if not setting.on_gpu:
        return [Record("device", True, None, "GiB", f"CPU, {os.cpu_count()} cores; {found}")]
    facts = torch.cuda.get_device_properties(setting.device)
    detail = (
        f"{facts.name}, compute capability {facts.major}.{facts.minor}, {facts.multi_processor_count} multiprocessors, "
        f"bfloat16 {'supported' if torch.cuda.is_bf16_supported() else 'not supported'}; {found}"
    )
    return [Record("device", torch.cuda.is_bf16_supported(), facts.total_memory / 2**30, "GiB", detail)]


def software() -> dict[str, str]:
    """Versions of what decides the figures."""
    found = versions()
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def machine(setting: Setting) -> str:
    """The device in a few words."""
    return torch.cuda.get_device_name(setting.device) if setting.on_gpu else "CPU"


def bf16_peak(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device by its name, None for one that is not in the table."""
    return next((peak for pattern, peak in BF16_PEAKS if re.search(pattern, device_name)), None)


# ---- golden parity --------------------------------------------------------------------------------------------------


def check_golden_fp32(setting: Setting) -> list[Record]:
    """The published package's numbers in float32 without TF32: the largest error of a tensor, relative to its size."""
    golden = load_file(GOLDEN / "tensors.safetensors")
    with without_tf32():
        found = golden_outputs(ColaDLM.from_published(GOLDEN, device=setting.device), golden)
    errors = {name: ((x - golden[name]).abs().max() / golden[name].abs().max()).item() for name, x in found.items()}
    worst = max(errors, key=errors.get)
    detail = f"worst is {worst}; tolerance {FP32_TOLERANCE:.0e}"
    return [Record("golden.fp32", errors[worst] <= FP32_TOLERANCE, errors[worst], "relative error", detail)]


def check_golden_bf16(setting: Setting) -> list[Record]:
    """The same in bfloat16: the root mean square error of a tensor, relative to its root mean square."""
    golden = load_file(GOLDEN / "tensors.safetensors")
    model = ColaDLM.from_published(GOLDEN, device=setting.device, dtype=torch.bfloat16)
    depths = {
        "encode": model.config.vae.encoder_layers,
        "decode": model.config.vae.decoder_layers,
        "train": model.config.dit.num_layers,
    }
    found = golden_outputs(model, golden)
    errors = {name: ((x - golden[name]).norm() / golden[name].norm()).item() for name, x in found.items()}
    shares = {name: error / bf16_tolerance(depths[name.split(".")[0]]) for name, error in errors.items()}
    worst = max(shares, key=shares.get)
    tolerance = errors[worst] / shares[worst] if shares[worst] else bf16_tolerance(1)
    detail = f"worst is {worst}; tolerance {tolerance:.1e}, derived from the roundings in series"
    return [Record("golden.bf16", shares[worst] <= 1.0, errors[worst], "relative error", detail)]


def bf16_tolerance(blocks: int) -> float:
    """Relative root mean square error that bfloat16 may cause in a network of so many blocks."""
    roundings = ROUNDINGS_PER_BLOCK * blocks + ROUNDINGS_AT_THE_ENDS
    return BF16_AMPLIFICATION * BF16_ROUNDING * math.sqrt(roundings)


def check_golden_generation(setting: Setting) -> list[Record]:
    """Greedy generation in float32: the share of tokens that are the published ones, over the first sample's."""
    golden = load_file(GOLDEN / "tensors.safetensors")
    published = json.loads((GOLDEN / "generate.json").read_text())
    prompt, equal, total = published["prompts"][0], 0, 0
    with without_tf32():
        model = ColaDLM.from_published(GOLDEN, device=setting.device)
        for index, run in enumerate(published["runs"]):
            settings = {name: run[name] for name in ("steps", "guidance_scale", "max_new_tokens", "repetition_penalty")}
            (output,) = model.generate(
                [prompt["question"]],
                ids=[prompt["id"]],
                noise_seed=published["noise_seed"],
                padding_id=published["pad_token_id"],
                **settings,
            )
            expected = golden[f"generate.{index}.ids"][0, :GOLDEN_TOKENS]
            equal += int((output.token_ids[: len(expected)] == expected).sum())
            total += len(expected)
    detail = f"{equal} of {total} tokens in {len(published['runs'])} runs"
    return [Record("golden.generation", equal == total, equal / total, "share of tokens", detail)]


def golden_outputs(model: ColaDLM, golden: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the golden tensors hold, computed by `model`, in float32 on the CPU."""
    found = {}
    for text in range(3):
        mean, logvar = model.encode(golden[f"encode.{text}.ids"])
        found |= {f"encode.{text}.mean": mean, f"encode.{text}.logvar": logvar}
    found["decode.logits"] = model.decode(golden["decode.z"], golden["decode.lengths"].tolist())
    t, z0, z1 = golden["train.t"], golden["train.z0"], golden["train.z1"]
    noisy = (1 - t[:, None, None]) * z0 + t[:, None, None] * z1
    found["train.velocity_noisy"] = model.velocity(z0, noisy, t)
    return {name: tensor.float().cpu() for name, tensor in found.items()}


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Float32 matrix products in float32."""
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = cudnn


# ---- training -------------------------------------------------------------------------------------------------------


def check_training(setting: Setting, stage: int, zero_stage: int) -> list[Record]:
    """Speed, utilisation and memory of optimiser steps on one batch, whose loss must fall."""
    config = setting.config(setting.preset, f"stage={stage}", f"parallel.zero_stage={zero_stage}")
    warm_up, measured = (1, 2) if setting.quick else (3, 10)
    with fresh_engine(config, setting.groups) as engine:
        batches = synthetic_batches(config, engine.accumulation, setting.device)
        first, *_ = [engine.step(batches, step) for step in range(warm_up)]
        synchronize(setting)
        began = time.perf_counter()
        metrics = [engine.step(batches, warm_up + step) for step in range(measured)]
        synchronize(setting)
        seconds = (time.perf_counter() - began) / measured
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
    rate = training_flops_per_sample(config) * samples / seconds
    peak = bf16_peak(machine(setting))
    if peak is None:
        of_peak = f"no bfloat16 peak in the table for {machine(setting)}; {rate / 1e12:.4g} TFLOP/s of model FLOPs"
    else:
        of_peak = f"{rate / 1e12:.1f} of {peak / 1e12:.0f} TFLOP/s; model FLOPs, recomputation not counted"
    memory = torch.cuda.max_memory_allocated(setting.device) / 2**30 if setting.on_gpu else None
    return [
        Record(f"{name}.speed", ok, samples * length / seconds, "tokens/s", detail),
        Record(f"{name}.utilisation", ok, rate / peak if peak else None, "of bf16 peak", of_peak),
        Record(f"{name}.memory", ok, memory, "GiB", "peak of what torch allocated, start included"),
    ]


def check_resume(setting: Setting, zero_stage: int) -> list[Record]:
    """2 n steps against n, a checkpoint, a new engine and n more: the largest difference of a weight."""
    preset, half = "small" if setting.on_gpu else "tiny", 1 if setting.quick else 2
    with tempfile.TemporaryDirectory() as folder:
        config = setting.config(preset, f"parallel.zero_stage={zero_stage}", f"runs_folder={folder}")
        with reproducible():
            straight = steps_from(setting, config, 0, 2 * half)
            steps_from(setting, config, 0, half, save=True)
            resumed = steps_from(setting, config, half, 2 * half)
            difference = largest_difference(straight, resumed)
            detail = f"{preset}, stage 2, bf16, {half} + {half} steps; 0 is bit for bit"
            if difference:
                again = largest_difference(straight, steps_from(setting, config, 0, 2 * half))
                detail += f"; two uninterrupted runs differ by {again:.1e}"
    return [Record(f"resume.zero{zero_stage}", difference == 0.0, difference, "largest difference", detail)]


def steps_from(
    setting: Setting, config: RunConfig, start: int, end: int, save: bool = False
) -> dict[str, torch.Tensor]:
    """Whole weights after steps start .. end - 1; from the checkpoint of `start` where that is not 0."""
    fingerprint = "synthetic"
    with fresh_engine(config, setting.groups) as engine:
        if start:
            checkpoint = config.run_folder / "checkpoints" / f"step_{start:08d}"
            found = check_checkpoint(checkpoint, config, fingerprint, setting.groups)
            if found != start:
                raise RuntimeError(f"{checkpoint} says step {found}")
            load_checkpoint(engine, checkpoint)
        for step in range(start, end):
            engine.step(synthetic_batches(config, engine.accumulation, setting.device, step), step)
        if save:
            save_checkpoint(engine, end, fingerprint, setting.groups)
        return engine.whole_weights()


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Over all weights of two models; NaN counts as different."""
    differences = [(first[name] - second[name]).abs().max().nan_to_num(nan=math.inf).item() for name in first]
    return max(differences)


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """Kernels that sum in the same order every time, where torch has them."""
    before, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # would write DeepSpeed's buckets for each engine
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
            torch.utils.deterministic.fill_uninitialized_memory = fill


@contextlib.contextmanager
def fresh_engine(config: RunConfig, groups: ProcessGroups) -> Iterator[Engine]:
    """The engine that training uses, on starting weights; in stage 2 the reference is the encoder as it starts."""
    release_memory()
    model = Cola(config, groups)
    initialize_parameters(model, config.seed, groups)
    if model.reference is not None:
        load_full_state_dict(model.reference, gather_state_dict(model.vae.encoder, groups), groups)
    engine = Engine(model.to(groups.device), config, groups)
    del model
    try:
        yield engine
    finally:
        engine.deepspeed.destroy()


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
            rows.append({"tokens": tokens, **sample_draws(config, index, step)})
        micro_batches.append(
            {name: torch.from_numpy(np.stack([row[name] for row in rows])).to(device) for name in rows[0]}
        )
    return itertools.cycle(micro_batches)


# ---- generation -----------------------------------------------------------------------------------------------------


def check_generation(setting: Setting, batch: int) -> list[Record]:
    """Speed of guided generation with random weights: 16 Euler steps a block, both passes."""
    config = setting.config(setting.preset, "training.vae_update.from_scratch=true")
    model = Cola(config, setting.groups)
    initialize_parameters(model, config.seed, setting.groups)
    model = model.to(setting.device, torch.bfloat16).eval()
    random = np.random.default_rng(0)
    prompts = random.integers(0, config.model.vocab_size, (batch, 64 if setting.on_gpu else 16)).tolist()
    new_tokens = (32 if setting.quick else 128) if setting.on_gpu else 16
    timed_generation(setting, model, prompts, 1)
    outputs, seconds = timed_generation(setting, model, prompts, new_tokens)
    generated = sum(len(output.token_ids) for output in outputs)
    ok = all(
        output.latents.isfinite().all() and int(output.token_ids.max()) < config.model.vocab_size for output in outputs
    )
    detail = f"{setting.preset}, bf16, prompts of {len(prompts[0])} tokens, {new_tokens} new ones, 16 steps, guidance 7"
    return [Record(f"generate.batch{batch}", bool(ok), generated / seconds, "tokens/s", detail)]


def timed_generation(
    setting: Setting, model: Cola, prompts: list[list[int]], new_tokens: int
) -> tuple[list[GeneratedBlocks], float]:
    """The generated blocks and the seconds they took."""
    settings = GenerationSettings(steps=16, guidance_scale=7.0, max_new_tokens=new_tokens)
    synchronize(setting)
    began = time.perf_counter()
    outputs = generate_blocks(model.vae, model.dit, prompts, list(range(len(prompts))), 0, settings)
    synchronize(setting)
    return outputs, time.perf_counter() - began


# ---- all of them ----------------------------------------------------------------------------------------------------


def all_checks(quick: bool = False) -> dict[str, Check]:
    """Every check by name, in the order in which they run; a quick look resumes under ZeRO 1 alone."""
    checks: dict[str, Check] = {
        "device": check_device,
        "golden.fp32": check_golden_fp32,
        "golden.bf16": check_golden_bf16,
        "golden.generation": check_golden_generation,
    }
    for stage, zero_stage in itertools.product((1, 2), (1, 2, 3)):
        checks[f"train.stage{stage}.zero{zero_stage}"] = partial(check_training, stage=stage, zero_stage=zero_stage)
    for zero_stage in (1,) if quick else (1, 2, 3):
        checks[f"resume.zero{zero_stage}"] = partial(check_resume, zero_stage=zero_stage)
    for batch in (1, 16):
        checks[f"generate.batch{batch}"] = partial(check_generation, batch=batch)
    return checks


def synchronize(setting: Setting) -> None:
    """Waits for the device."""
    if setting.on_gpu:
        torch.cuda.synchronize(setting.device)


def release_memory() -> None:
    """Gives back what no one refers to any more and counts the peak anew: checks must not see each other's memory."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
