"""The checks of `tools.gpu_check`, each a function of a `Setting` that returns its records, and what they share."""

from __future__ import annotations

import gc
import itertools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from cola_megatron.config import RunConfig, load_config
from cola_megatron.parallel import ProcessGroups
from cola_megatron.training.versions import versions

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


def all_checks(quick: bool = False) -> dict[str, Check]:
    """Every check by name, in the order in which they run; a quick look resumes under ZeRO 1 alone."""
    # Not at the top: each of these files imports this one.
    from tools import gpu_generation, gpu_parity, gpu_training

    checks: dict[str, Check] = {
        "device": check_device,
        "golden.fp32": gpu_parity.check_golden_fp32,
        "golden.bf16": gpu_parity.check_golden_bf16,
        "golden.generation": gpu_parity.check_golden_generation,
    }
    for stage, zero_stage in itertools.product((1, 2), (1, 2, 3)):
        name = f"train.stage{stage}.zero{zero_stage}"
        checks[name] = partial(gpu_training.check_training, stage=stage, zero_stage=zero_stage)
    for zero_stage in (1,) if quick else (1, 2, 3):
        checks[f"resume.zero{zero_stage}"] = partial(gpu_training.check_resume, zero_stage=zero_stage)
    for batch in (1, 16):
        checks[f"generate.batch{batch}"] = partial(gpu_generation.check_generation, batch=batch)
    return checks


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
