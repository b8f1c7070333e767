"""How much of this machine a study may use."""

from __future__ import annotations

import os
import subprocess

import psutil

from cola_megatron.preflight.gpus import QUERY, TIMEOUT_SECONDS, read_query
from launchers.sweep_run import Machine

MEMORY_SHARE = 0.9
"""Of what is free now."""


def machine(at_once: int | None, memory_gib: float | None) -> Machine:
    """With GPUs one job on each of them; else one for every core, as far as the memory goes."""
    gpus = visible_gpus()
    wanted = at_once or len(gpus) or len(os.sched_getaffinity(0))
    memory = memory_gib * 2**30 if memory_gib is not None else MEMORY_SHARE * psutil.virtual_memory().available
    return Machine(wanted, memory, gpus)


def visible_gpus() -> tuple[str, ...]:
    """As CUDA_VISIBLE_DEVICES names them; empty: none."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return tuple(each for each in given.split(",") if each and each != "-1")
    try:
        answer = subprocess.run(QUERY, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(str(row["index"]) for row in read_query(answer.stdout))
