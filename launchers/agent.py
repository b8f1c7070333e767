"""The processes of one node: torchrun's agent, with ends that tell what happened.

Torchrun itself ends with 1 whatever its processes ended with, and gives them 30 s after a SIGTERM. Here the agent ends
with the exit code that says most, and a signal that asks for the end is handed to the processes, which save and end by
themselves. Where processes of another node failed, its agent says so in the store of the rendezvous, and those here,
which may wait for them in a collective, are ended if they do not end by themselves.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING

import psutil

from cola_megatron.cuda_environment import set_allocator
from cola_megatron.errors import ExitCode, RendezvousFailed
from slurm.supervise import decisive

__all__ = ["Node", "run_processes"]

if TYPE_CHECKING:
    from torch.distributed import Store
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
PRESENT, FAILED, ENDED = "present/", "failed", "ended"
POLL_SECONDS = 1.0
GRACE_SECONDS = 15.0
"""After a failure on another node, before the processes here are ended: the ranks know better what happened."""
LINGER_SECONDS = 60.0
"""The first node keeps the store for so long after its own end, for the last words of the others."""


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


def run_processes(command: Sequence[str], processes: int, node: Node) -> int:
    """Starts so many processes of a `cola` command here, as ranks of the job, and waits for their end.

    Returns:
        0, or the exit code of the process that says most of why they ended (128 + N after signal N).

    Raises:
        RendezvousFailed: the address is taken, cannot be reached, or nodes are missing.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    set_allocator()
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousTimeoutError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    host, _, _ = node.rendezvous.rpartition(":")
    config = LaunchConfig(
        min_nodes=node.nodes,
        max_nodes=node.nodes,
        nproc_per_node=processes,
        run_id=node.job,
        rdzv_backend="c10d",
        rdzv_endpoint=node.rendezvous,
        rdzv_configs={
            "is_host": node.rank == 0,
            "join_timeout": node.rendezvous_seconds,  # until all nodes are there
            "read_timeout": node.rendezvous_seconds,  # until the first one is
        },
        local_addr=host if node.rank == 0 else None,
        max_restarts=0,  # whoever started this node knows of the others, and tries again
        monitor_interval=0.5,
        start_method="spawn",
        signals_to_handle="SIGQUIT",  # the others are ours
    )
    others = _OtherNodes(node)
    with _handing_on_signals(), others:
        try:
            elastic_launch(config, sys.executable)("-m", "cola_megatron", *command)
        except ChildFailedError as error:
            # While this error is held, so is the store: other nodes can still read it.
            return others.tell(_decisive(error.failures, others.failed))
        except (RendezvousError, OSError, RuntimeError) as error:
            if others.failed is not None:
                return ExitCode.RANK_LOST
            if others.met_the_first and node.rank > 0:
                print(f"cola: node {node.rank}: the first node is gone", file=sys.stderr, flush=True)
                return ExitCode.RANK_LOST
            # Where the first node did not come as far as to wait, the address may be that of a stranger.
            silent = [0] if node.rank > 0 else others.silent() if isinstance(error, RendezvousTimeoutError) else []
            raise _why_they_did_not_meet(node, silent, error) from error
    return ExitCode.DONE


class _OtherNodes:
    """What the agents of a job tell each other about failures; nothing in a job of one node."""

    def __init__(self, node: Node):
        self.node = node
        self.failed: str | None = None
        self.met_the_first = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="other nodes", daemon=True)

    def __enter__(self) -> None:
        if self.node.nodes > 1:
            self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            # A thread that the end of Python finds inside of the store aborts the process, whatever its exit code.
            self._thread.join(5 * POLL_SECONDS)

    def silent(self) -> list[int]:
        """The nodes that the first one, which is this, has not heard of."""
        store = self._connect()
        return [rank for rank in range(1, self.node.nodes) if not store.check([f"{PRESENT}{rank}"])]

    def tell(self, code: int) -> int:
        """Announces how the processes here ended; the node of the store then waits for the others. Returns `code`."""
        if self.node.nodes == 1:
            return code
        self._over.set()
        with contextlib.suppress(RuntimeError):  # the store is gone: everybody knows
            store = self._connect()
            if code not in (ExitCode.STOPPED, ExitCode.RANK_LOST):
                store.set(FAILED, f"node {self.node.rank} with exit code {code}")
            ended, until = store.add(ENDED, 1), time.monotonic() + LINGER_SECONDS
            while self.node.rank == 0 and ended < self.node.nodes and time.monotonic() < until:
                time.sleep(POLL_SECONDS)
                ended = store.add(ENDED, 0)
        return code

    def _watch(self) -> None:
        with contextlib.suppress(RuntimeError):  # the ranks notice as well that the store is gone
            store = self._connect()
            store.set(f"{PRESENT}{self.node.rank}", "")
            self.met_the_first = True
            while not self._over.wait(POLL_SECONDS):
                if store.check([FAILED]):
                    self._end_processes(store.get(FAILED).decode())
                    return

    def _end_processes(self, failed: str) -> None:
        if self._over.wait(GRACE_SECONDS):
            return
        self.failed = failed
        print(f"cola: the processes of {failed} are gone; those here are ended", file=sys.stderr, flush=True)
        for child in psutil.Process().children():
            child.kill()

    def _connect(self) -> "Store":
        from torch.distributed import PrefixStore, TCPStore

        host, _, port = self.node.rendezvous.rpartition(":")
        timeout = timedelta(seconds=self.node.rendezvous_seconds)
        # A try that ended may have left its store behind.
        return PrefixStore(f"cola/{self.node.job}", TCPStore(host, int(port), timeout=timeout))


def _why_they_did_not_meet(node: Node, silent: list[int], error: BaseException) -> RendezvousFailed:
    if silent:
        # `slurm/supervise.py` reads the numbers, and leaves these nodes out of the next try.
        return RendezvousFailed(
            f"{node.rendezvous}: node {node.rank} of {node.nodes} had no answer from node "
            f"{','.join(map(str, silent))} within {node.rendezvous_seconds} s; did it start, and can the two "
            "reach each other on this address (NCCL_SOCKET_IFNAME, firewalls)?"
        )
    said = " ".join(str(error).split())[:300]
    return RendezvousFailed(
        f"{node.rendezvous}: {node.nodes} nodes did not meet there ({said}); is the port taken by another process, is "
        "the address reachable from every node, did every node start?"
    )


def _decisive(failures: dict[int, "ProcessFailure"], failed_elsewhere: str | None) -> int:
    if failed_elsewhere is not None:
        return ExitCode.RANK_LOST  # we ended them ourselves
    codes = {rank: _exit_code(failure.exitcode) for rank, failure in sorted(failures.items())}
    for rank, code in codes.items():
        print(f"cola: rank {rank} ended with exit code {code}", file=sys.stderr, flush=True)
    return decisive(list(codes.values()))


@contextlib.contextmanager
def _handing_on_signals() -> Iterator[None]:
    handled = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores one
    before = {number: signal.signal(number, _ask_processes_to_stop) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ask_processes_to_stop(number: int, frame: FrameType | None) -> None:
    children = psutil.Process().children()
    if not children:  # still waiting for other nodes
        sys.exit(ExitCode.STOPPED)
    for child in children:
        child.send_signal(signal.SIGUSR1)


def _exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code
