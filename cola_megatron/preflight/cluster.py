"""What only several processes together can tell: whether nodes agree, and which of them is slow."""

import os
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from cola_megatron.parallel import ProcessGroups
from cola_megatron.preflight.check import Check, Status
from cola_megatron.preflight.installation import versions

REPEATS = 5
WARN_SKEW_SECONDS, FAIL_SKEW_SECONDS = 1.0, 30.0


@dataclass(frozen=True)
class Findings:
    """On the main process: the lines, and the nodes that are to blame, with reasons."""

    checks: list[Check]
    bad_nodes: dict[str, list[str]]


def node_name() -> str:
    """This machine as Slurm calls it, or its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def check_cluster(
    groups: ProcessGroups,
    local: list[Check],
    slow_fraction: float = 0.8,
    strict: bool | None = None,
    matrix_product: Callable[[torch.device], float] | None = None,
    stage: Callable[[str], None] = lambda name: None,
) -> Findings | None:
    """Compares the nodes of a job; all ranks call it.

    Args:
        local: what this rank's machine was found to be; given by one rank of every node.
        slow_fraction: a node below this share of the median is slow.
        strict: slow nodes are bad; None: where they have GPUs. Cores are shared with others, and their speed varies.
        matrix_product: measures FLOP/s of this rank's device.
        stage: told what is looked at now.

    Returns:
        what was found, on the main process; elsewhere None.
    """
    strict = groups.device.type == "cuda" if strict is None else strict
    stage("matrix product")
    flops = (matrix_product or measure_matrix_product)(groups.device)
    stage("clocks")
    groups.barrier()
    clock = time.time()
    stage("all-reduce")
    bandwidth = measure_all_reduce(groups)
    stage("collecting")
    mine = {
        "node": node_name(),
        "checks": local,
        "versions": versions(),
        "flops": flops,
        "clock": clock,
        "bandwidth": bandwidth,
    }
    everyone: list[Any] | None = [None] * groups.world_size if groups.is_main else None
    dist.gather_object(mine, everyone)
    if everyone is None:
        return None
    checks = [replace(check, node=each["node"]) for each in everyone for check in each["checks"]]
    bad: dict[str, list[str]] = defaultdict(list)
    for check in checks:
        # Of one node only: what fails everywhere is not the node's fault.
        alike = {other.node for other in checks if other.name == check.name and other.status is Status.FAILED}
        if check.status is Status.FAILED and len(alike) < len({each["node"] for each in everyone}):
            bad[check.node].append(f"{check.name}: {check.value}")
    checks.append(_versions(everyone, bad))
    checks.append(_clocks(everyone, bad))
    checks += _products(everyone, slow_fraction, strict, bad)
    checks.append(Check("all-reduce", Status.OK, f"{bandwidth / 1e9:.2f} GB/s over {groups.world_size} processes"))
    return Findings(checks, dict(bad))


def measure_matrix_product(device: torch.device) -> float:
    """FLOP/s of the best of some products: bfloat16 of 8192 on a GPU, float32 of 512 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b  # the first call sets up libraries
    return 2 * size**3 / _best(lambda: a @ b, device)


def measure_all_reduce(groups: ProcessGroups) -> float:
    """Bytes/s that every rank sends: 2 (n - 1) / n of the tensor, of the best of some sums. All ranks call it."""
    count = 2**26 if groups.device.type == "cuda" else 2**18
    values = torch.ones(count, device=groups.device)
    seconds = _best(lambda: dist.all_reduce(values), groups.device)
    return 2 * (groups.world_size - 1) / groups.world_size * values.nbytes / seconds


def _best(work: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)


def _versions(everyone: list[dict], bad: dict[str, list[str]]) -> Check:
    """The version that most nodes have is taken for the right one."""
    problems = []
    for package in everyone[0]["versions"]:
        by_node = {each["node"]: each["versions"][package] for each in everyone}
        usual = statistics.mode(by_node.values())
        for node, found in by_node.items():
            if found != usual:
                problems.append(f"{node} has {package} {found}, the others {usual}")
                bad[node].append(f"{package} {found} instead of {usual}")
    cure = "one environment for all nodes: a shared file system, or one image" if problems else ""
    value = "; ".join(problems) or "the same on all nodes"
    return Check("versions", Status.FAILED if problems else Status.OK, value, cure)


def _clocks(everyone: list[dict], bad: dict[str, list[str]]) -> Check:
    """After a barrier all clocks should show the same, but for the time that the barrier's end takes to arrive."""
    middle = statistics.median(each["clock"] for each in everyone)
    skews = {each["node"]: each["clock"] - middle for each in everyone}
    node, skew = max(skews.items(), key=lambda item: abs(item[1]))
    if abs(skew) < WARN_SKEW_SECONDS:
        return Check("clocks", Status.OK, f"within {abs(skew):.3f} s")
    failed = abs(skew) >= FAIL_SKEW_SECONDS
    if failed:
        bad[node].append(f"clock {skew:+.1f} s")
    status = Status.FAILED if failed else Status.WARNING
    return Check("clocks", status, f"{node} is {skew:+.1f} s from the others", "is its time service running (chrony)?")


def _products(everyone: list[dict], slow_fraction: float, strict: bool, bad: dict[str, list[str]]) -> list[Check]:
    median = statistics.median(each["flops"] for each in everyone)
    slowest = {each["node"]: 0.0 for each in everyone}
    for node in slowest:
        slowest[node] = min(each["flops"] for each in everyone if each["node"] == node) / median
    found = []
    for node, share in slowest.items():
        if share < slow_fraction:
            if strict:
                bad[node].append(f"matrix product {share:.0%} of the median")
            status = Status.FAILED if strict else Status.WARNING
            cure = "look at its clocks, temperature and power; the job leaves it out" if strict else "is it busy?"
            found.append(Check("matrix product", status, f"{share:.0%} of the median", cure, node))
    return found or [Check("matrix product", Status.OK, f"{median / 1e12:.3g} TFLOP/s, no node is slow")]
