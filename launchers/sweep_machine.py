"""How much of this machine a study may use."""

from __future__ import annotations

import os
import subprocess

import psutil

from cola_megatron.config import ConfigError
from cola_megatron.preflight.gpus import QUERY, TIMEOUT_SECONDS, read_query
from launchers.sweep_run import Machine

MEMORY_SHARE = 0.9
"""Of what is free now."""


def machine(at_once: int | None, memory_gib: float | None, processes: int = 1) -> Machine:
    """With GPUs a job on each of them, or on as many as it has processes; else one for so many cores.

    Raises:
        ConfigError: a run has more processes than there are GPUs.
    """
    found = visible_gpus()
    if found and processes > len(found):
        raise ConfigError(f"--processes {processes}: here are {len(found)} GPUs, and each process takes one")
    gpus = [found[first : first + processes] for first in range(0, len(found) - processes + 1, processes)]
    wanted = at_once or len(gpus) or max(1, len(os.sched_getaffinity(0)) // processes)
    memory = memory_gib * 2**30 if memory_gib is not None else MEMORY_SHARE * psutil.virtual_memory().available
    return Machine(wanted, memory, tuple(",".join(each) for each in gpus), processes)


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
