"""How this process learns of its place in a job, and what it says where it cannot join it."""

import os
import re
from collections.abc import Mapping

from cola_megatron.config import ConfigError
from cola_megatron.errors import RendezvousFailed


def place_from_srun(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE of a task of srun; nothing where torchrun gave them.

    Raises:
        ConfigError: srun started several tasks, and no address was given where they could meet.
    """
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if "WORLD_SIZE" in environment or tasks == 1:
        return {}
    if not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        raise ConfigError(
            f"srun started {tasks} tasks that do not know where to meet; export MASTER_ADDR (the first node) and "
            "MASTER_PORT before srun, or start one torchrun or `cola launch` on every node"
        )
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(
            tasks_of_node(environment["SLURM_STEP_TASKS_PER_NODE"], int(environment["SLURM_NODEID"]))
        ),
    }


def tasks_of_node(written: str, node: int) -> int:
    """Tasks of a node out of Slurm's short form: `8(x4),4` is 8 on four nodes and 4 on the fifth."""
    for part in written.split(","):
        match = re.fullmatch(r"(\d+)(\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"{written} is not how Slurm writes the tasks of nodes")
        tasks, _, nodes = match.groups()
        node -= int(nodes or 1)
        if node < 0:
            return int(tasks)
    raise ValueError(f"{written} has no node {node}")


def has_a_gpu_of_its_own(gpus: int) -> bool:
    """Whether Slurm shows this task one GPU of several tasks' (--gpus-per-task): then it is number 0 for everyone."""
    return gpus == 1 and "SLURM_LOCALID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ


def cannot_join(error: BaseException) -> RendezvousFailed:
    """One line of what torch said when the processes were to meet."""
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    said = " ".join(str(error).split())[:300]
    if "EADDRINUSE" in said or "address already in use" in said.lower():
        return RendezvousFailed(
            f"{address}: the port is in use by another process, or one left over; give another MASTER_PORT, or end it"
        )
    return RendezvousFailed(
        f"{address}: the {os.environ.get('WORLD_SIZE')} processes of this job did not meet there ({said}); is the "
        "address reachable from every node, did every process start?"
    )
