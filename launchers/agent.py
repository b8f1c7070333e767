"""The processes of one node: torchrun's agent, with ends that tell what happened.

Torchrun itself ends with 1 whatever its processes ended with, and gives them 30 s after a SIGTERM. Here the agent ends
with the exit code that says most, and a signal that asks for the end is handed to the processes, which save and end by
themselves.
"""

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

import psutil

from cola_megatron.errors import ExitCode, UserError
from slurm.supervise import decisive

__all__ = ["Node", "run_processes"]

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass(frozen=True)
class Node:
    """This node's place among those of the job."""

    nodes: int
    rank: int
    rendezvous: str
    """HOST:PORT of the first node."""
    job: str
    """The same on all nodes of a try, and on no others."""
    rendezvous_seconds: int


class RendezvousFailed(UserError):
    """The nodes did not find each other."""

    exit_code = ExitCode.CRASHED


def run_processes(command: Sequence[str], processes: int, node: Node) -> int:
    """Starts so many processes of a `cola` command here, as ranks of the job, and waits for their end.

    Returns:
        0, or the exit code of the process that says most of why they ended (128 + N after signal N).

    Raises:
        RendezvousFailed: the address is taken, cannot be reached, or nodes are missing.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    host, _, _ = node.rendezvous.rpartition(":")
    config = LaunchConfig(
        min_nodes=node.nodes,
        max_nodes=node.nodes,
        nproc_per_node=processes,
        run_id=node.job,
        rdzv_backend="c10d",
        rdzv_endpoint=node.rendezvous,
        rdzv_configs={"is_host": node.rank == 0, "timeout": node.rendezvous_seconds},
        local_addr=host if node.rank == 0 else None,
        max_restarts=0,  # whoever started this node knows of the others, and tries again
        monitor_interval=0.5,
        start_method="spawn",
        signals_to_handle="SIGHUP",  # the others are ours
    )
    before = {number: signal.signal(number, _ask_processes_to_stop) for number in STOP_SIGNALS}
    try:
        elastic_launch(config, sys.executable)("-m", "launchers.cli", *command)
    except ChildFailedError as error:
        codes = {rank: _exit_code(failure.exitcode) for rank, failure in error.failures.items()}
        for rank, code in sorted(codes.items()):
            print(f"cola: rank {rank} ended with exit code {code}", file=sys.stderr)
        return decisive(list(codes.values()))
    except (RendezvousError, OSError, RuntimeError) as error:
        raise RendezvousFailed(
            f"{node.rendezvous}: {node.nodes} nodes did not meet there ({' '.join(str(error).split())[:300]}); is the "
            "port taken by another process, is the address reachable from every node, did every node start?"
        ) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return ExitCode.DONE


def _ask_processes_to_stop(number: int, frame: FrameType | None) -> None:
    children = psutil.Process().children()
    if not children:  # still waiting for other nodes
        sys.exit(ExitCode.STOPPED)
    for child in children:
        child.send_signal(signal.SIGUSR1)


def _exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code
