"""`cola doctor`: can this machine, or can these, train?"""

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from launchers.output import print_json


def doctor(
    folder: Path = typer.Argument(Path("runs"), help="Where runs will be written; need not exist."),
    report: Path = typer.Option(None, help="JSON file to write: ok, bad_nodes with reasons, checks."),
    timeout: float = typer.Option(120.0, min=1, help="Seconds after which it ends, naming what it waited for."),
    slow_fraction: float = typer.Option(0.8, min=0.0, max=1.0, help="A node below this share of the median is slow."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """Look at versions, accelerators, GPUs, memory, disk, and at the nodes of a job against each other.

    Every job of `cola submit` runs it before it trains. Exit codes: 0 nothing failed, 73 the named nodes are to blame,
    70 it took too long, 1 otherwise.

    Examples: `cola doctor`; `cola launch --nproc 8 doctor runs`
    """
    from cola_megatron.errors import ExitCode
    from cola_megatron.preflight import Status
    from cola_megatron.preflight.gpus import gpu_checks
    from cola_megatron.preflight.installation import installation_checks
    from cola_megatron.preflight.machine import machine_checks

    with _within(timeout) as stage:
        stage("this machine")
        alone = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))) == 0
        local = [*installation_checks(), *gpu_checks(), *machine_checks(folder)] if alone else []
        checks = local
        bad_nodes: dict[str, list[str]] = {}
        if max(int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))) > 1:
            from cola_megatron.parallel import initialize_parallel
            from cola_megatron.preflight.cluster import check_cluster

            stage("rendezvous")
            groups = initialize_parallel(timeout_minutes=timeout / 60)
            findings = check_cluster(groups, local, slow_fraction, stage=stage)
            verdict: list[Any] = [None, None] if findings is None else [findings.bad_nodes, findings.checks]
            stage("verdict")
            import torch.distributed as dist

            dist.broadcast_object_list(verdict)
            bad_nodes, checks = verdict
            if findings is None:  # the main process has the say, and all end as it does
                raise typer.Exit(_code(checks, bad_nodes))
    failed = any(check.status is Status.FAILED for check in checks)
    answer = {"ok": not failed, "bad_nodes": bad_nodes, "checks": [asdict(check) for check in checks]}
    if report is not None:
        unfinished = report.with_suffix(".writing")
        unfinished.write_text(json.dumps(answer, indent=1) + "\n")
        unfinished.replace(report)
    if as_json:
        print_json(answer)
    else:
        _print(checks, bad_nodes)
    code = _code(checks, bad_nodes)
    if code != ExitCode.DONE:
        raise typer.Exit(code)


def _code(checks: list, bad_nodes: dict[str, list[str]]) -> int:
    from cola_megatron.errors import ExitCode
    from cola_megatron.preflight import Status

    if bad_nodes:
        return ExitCode.BAD_NODE
    return ExitCode.FAILED if any(check.status is Status.FAILED for check in checks) else ExitCode.DONE


def _print(checks: list, bad_nodes: dict[str, list[str]]) -> None:
    """What all nodes agree on stands there once."""
    seen: dict[tuple, list[str]] = {}
    for check in checks:
        seen.setdefault((check.name, check.status, check.value, check.cure), []).append(check.node)
    width = max(len(name) for name, *_ in seen)
    nodes = {check.node for check in checks if check.node}
    for (name, status, value, cure), where in seen.items():
        place = "" if not where[0] or len(set(where)) == len(nodes) else f" ({', '.join(sorted(set(where)))})"
        print(f"  {status:<7}  {name:<{width}}  {value}{place}" + (f" -> {cure}" if cure else ""))
    for node, reasons in sorted(bad_nodes.items()):
        print(f"bad node {node}: {'; '.join(reasons)}")


@contextmanager
def _within(seconds: float) -> Iterator:
    """Ends the process after so long, from a thread: the main one may wait inside a collective."""
    over, stages = threading.Event(), ["the start"]

    def watch() -> None:
        if not over.wait(seconds):
            from cola_megatron.errors import ExitCode
            from cola_megatron.preflight.cluster import node_name

            print(f"cola: doctor on {node_name()}: no end within {seconds:g} s at: {stages[-1]}", file=sys.stderr)
            sys.stderr.flush()
            os._exit(ExitCode.CRASHED)  # another try may find them awake

    threading.Thread(target=watch, name="doctor's limit", daemon=True).start()
    try:
        yield stages.append
    finally:
        over.set()
