"""The checks of `tools.gpu_check`, each a function of a `Setting` that returns its records."""

from __future__ import annotations

import itertools
import os
from functools import partial

import torch

from tools import (
    gpu_ceilings,
    gpu_checkpoint,
    gpu_documents,
    gpu_generation,
    gpu_parity,
    gpu_step,
    gpu_training,
)
from tools.gpu_setting import Check, Record, Setting, software

GENERATED_BATCHES = (1, 8, 64)


def all_checks(quick: bool = False) -> dict[str, Check]:
    """Every check by name, in the order in which they run: what a run that is cut off should have had comes first.

    A quick look at resuming is at ZeRO 1 alone.
    """
    checks: dict[str, Check] = {
        "device": check_device,
        "ceilings.copy": gpu_ceilings.check_copy,
        "ceilings.product": gpu_ceilings.check_products,
        "golden.fp32": gpu_parity.check_golden_fp32,
        "golden.bf16": gpu_parity.check_golden_bf16,
        "golden.generation": gpu_parity.check_golden_generation,
    }
    checks["step.paper-2b"] = partial(gpu_step.check_step, name="step.paper-2b", sweep=not quick)
    checks["step.paper-2b.one_of_eight"] = partial(
        gpu_step.check_step, name="step.paper-2b.one_of_eight", accumulation=gpu_step.ONE_OF_EIGHT
    )
    for switch, overrides in gpu_step.SWITCHES.items():
        name = f"step.paper-2b.{switch}"
        checks[name] = partial(gpu_step.check_step, name=name, overrides=overrides)
    for family in gpu_step.OTHER_FAMILIES[:1] if quick else gpu_step.OTHER_FAMILIES:
        name = f"step.paper-2b-{family}"
        checks[name] = partial(gpu_step.check_step, name=name, family=family)
    checks["ceilings.attention"] = gpu_ceilings.check_attention
    checks["attention.documents"] = gpu_documents.check_documents
    for batch in GENERATED_BATCHES:
        checks[f"generate.batch{batch}"] = partial(gpu_generation.check_generation, batch=batch)
    for zero_stage in (1,) if quick else (1, 2, 3):
        checks[f"resume.zero{zero_stage}"] = partial(gpu_training.check_resume, zero_stage=zero_stage)
    checks["checkpoint"] = gpu_checkpoint.check_save
    for stage, zero_stage in itertools.product((1, 2), (1, 2, 3)):
        name = f"train.stage{stage}.zero{zero_stage}"
        checks[name] = partial(gpu_training.check_training, stage=stage, zero_stage=zero_stage)
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
