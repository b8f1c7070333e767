"""The checks of `tools.gpu_check`, each a function of a `Setting` that returns its records."""

from __future__ import annotations

import itertools
import os
from functools import partial

import torch

from tools import gpu_generation, gpu_parity, gpu_training
from tools.gpu_setting import Check, Record, Setting, software


def all_checks(quick: bool = False) -> dict[str, Check]:
    """Every check by name, in the order in which they run; a quick look resumes under ZeRO 1 alone."""
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
