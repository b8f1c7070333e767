"""GPUs as the driver reports them."""

import csv
import io
import os
import subprocess
from collections.abc import Iterator

from cola_megatron.cuda_environment import ALLOCATOR, ALLOCATOR_NEW_NAME, QUEUES
from cola_megatron.preflight.check import Check, Status

FIELDS = (
    "index",
    "name",
    "memory.total",
    "memory.used",
    "ecc.errors.uncorrected.volatile.total",
    "remapped_rows.pending",
    "remapped_rows.failure",
    "clocks.sm",
    "clocks.max.sm",
    "clocks_throttle_reasons.hw_thermal_slowdown",
    "clocks_throttle_reasons.hw_power_brake_slowdown",
    "temperature.gpu",
    "driver_version",
)
QUERY = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
TIMEOUT_SECONDS = 30
USED_MIB = 1024
"""More is another process's: a context alone takes some hundred."""


def gpu_checks() -> list[Check]:
    """A line for each GPU of this machine, one for torch's view of them, one for what CUDA is told at its start."""
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except FileNotFoundError:
        return [Check("GPUs", Status.NOTE, "no nvidia-smi: a run on CPUs")]
    except subprocess.TimeoutExpired:
        cure = "a GPU or the driver hangs: restart the node"
        return [Check("GPUs", Status.FAILED, f"nvidia-smi gave no answer within {TIMEOUT_SECONDS} s", cure)]
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())
        return [Check("GPUs", Status.FAILED, f"nvidia-smi: {said}", "see the driver's log on that node (dmesg)")]
    checks = [_gpu(row) for row in read_query(done.stdout)]
    return [*checks, _torch(len(checks)), *([_environment()] if checks else [])]


def read_query(text: str) -> list[dict[str, str | None]]:
    """The answer of nvidia-smi, a mapping for each GPU; None where a GPU does not know a field."""
    rows = csv.reader(io.StringIO(text), skipinitialspace=True)
    return [
        {field: None if value.startswith("[") or not value else value for field, value in zip(FIELDS, row, strict=True)}
        for row in rows
        if row
    ]


def _gpu(row: dict[str, str | None]) -> Check:
    name = f"GPU {row['index']}"
    problems = list(problems_of(row))
    if problems:
        worst = Status.FAILED if any(status is Status.FAILED for status, _, _ in problems) else Status.WARNING
        values, cures = [value for _, value, _ in problems], dict.fromkeys(cure for _, _, cure in problems)
        return Check(name, worst, f"{row['name']}: {', '.join(values)}", "; ".join(cures))
    clock = f", {row['clocks.sm']} of {row['clocks.max.sm']} MHz" if row["clocks.max.sm"] else ""
    return Check(name, Status.OK, f"{row['name']}, {row['memory.total']} MiB{clock}, driver {row['driver_version']}")


def problems_of(row: dict[str, str | None]) -> Iterator[tuple[Status, str, str]]:
    """(status, what, cure) of everything that is wrong with a GPU."""
    used, errors = row["memory.used"], row["ecc.errors.uncorrected.volatile.total"]
    if used is not None and float(used) > USED_MIB:
        yield Status.FAILED, f"{used} MiB are in use by another process", "end it (`nvidia-smi` names it)"
    if errors is not None and int(errors) > 0:
        yield Status.FAILED, f"{errors} uncorrected memory errors", "reset the GPU, or have it replaced"
    if row["remapped_rows.failure"] in ("Yes", "1"):
        yield Status.FAILED, "memory rows that could not be remapped", "have it replaced"
    if row["remapped_rows.pending"] in ("Yes", "1"):
        yield Status.WARNING, "memory rows wait to be remapped", "reset the GPU"
    for field, why in (
        ("clocks_throttle_reasons.hw_thermal_slowdown", "too hot"),
        ("clocks_throttle_reasons.hw_power_brake_slowdown", "braked by its power supply"),
    ):
        if row[field] == "Active":
            yield (
                Status.FAILED,
                f"slowed down: {why} ({row['temperature.gpu']} C)",
                "look at the node's cooling and power",
            )


def _torch(gpus: int) -> Check:
    import torch

    seen, built = torch.cuda.device_count(), torch.version.cuda
    if built is None:
        return Check(
            "torch and CUDA", Status.FAILED, "torch was built for CPUs", "install a CUDA build (docs/install.md)"
        )
    if seen == 0:
        cure = "the driver is older than torch's CUDA, or the job was given no GPU (CUDA_VISIBLE_DEVICES)"
        return Check("torch and CUDA", Status.FAILED, f"torch (CUDA {built}) sees none of {gpus} GPUs", cure)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return Check("torch and CUDA", Status.OK, f"CUDA {built}, nccl {nccl}, {seen} of {gpus} GPUs")


def _environment() -> Check:
    """What `cuda_environment.py` has set, or the user before it."""
    name = ALLOCATOR_NEW_NAME if ALLOCATOR_NEW_NAME in os.environ else ALLOCATOR
    allocator, queues = os.environ.get(name), os.environ.get(QUEUES)
    value = f"{name}={allocator}, {QUEUES}={queues}"
    if queues is None:
        value = f"{name}={allocator}; {QUEUES} is set to 1 under tensor parallelism"
    cures = []
    if "expandable_segments:True" not in (allocator or ""):
        cures.append("without expandable_segments:True memory can lie free in pieces")
    if queues not in (None, "1"):
        cures.append(f"tensor parallelism wants {QUEUES}=1")
    return Check("CUDA environment", Status.NOTE if cures else Status.OK, value, "; ".join(cures))
