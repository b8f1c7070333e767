"""Slurm's own commands."""

import re
import subprocess
from collections.abc import Sequence

from cola_megatron.errors import UserError

__all__ = ["SlurmError", "cancel", "run", "submit", "test_only"]

CURES = {
    "invalid partition": "give --partition, or `partition` in the site file (`sinfo` lists them)",
    "invalid account": "give --account, or `account` in the site file (`sacctmgr show assoc` lists yours)",
    "invalid qos": "set `qos` in the site file",
    "node configuration is not available": "no node of the partition has so many GPUs, cores or so much memory: see "
    "gpus_per_node, cpus_per_node and memory_per_node of the site file, and `sinfo -o '%P %c %m %G'`",
    "invalid generic resource": "these nodes have no such GPUs: see gpu_type and gpu_option of the site file",
    "more nodes": "the partition has fewer nodes: lower --nodes",
    "node count": "the partition does not allow so many nodes: see `scontrol show partition`, or lower --nodes",
    "time limit": "give a --time that the partition allows (`sinfo -o '%P %l'`)",
    "unable to contact": "the controller does not answer: is it up (`scontrol ping`)?",
}
TIMEOUT_SECONDS = 120


class SlurmError(UserError):
    """There is no Slurm here, or it refuses; one line with what it said and the cure."""


def run(command: Sequence[str]) -> str:
    """The output of one of Slurm's commands.

    Raises:
        SlurmError: it is not there, does not answer, or fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)
    except FileNotFoundError:
        raise SlurmError(
            f"{command[0]}: not found, so there is no Slurm on this machine; submit from a login node, or train here "
            "with `cola launch`"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]}: no answer within {TIMEOUT_SECONDS} s; see `scontrol ping`") from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        cure = next((cure for sign, cure in CURES.items() if sign in said.lower()), None)
        raise SlurmError(f"{command[0]}: {said}" + (f"; {cure}" if cure else ""))
    return done.stdout.strip()


def test_only(script: str) -> str:
    """Whether Slurm would take a batch script, and what it says of the start; raises SlurmError."""
    try:
        done = subprocess.run(
            ["sbatch", "--test-only", script], capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        run(["sbatch", "--version"])
        raise
    if done.returncode:
        run(["sbatch", "--test-only", script])
    return " ".join(done.stderr.split()).removeprefix("sbatch: ")


def submit(script: str, after: Sequence[str] = (), condition: str = "afterok") -> str:
    """Submits a batch script that waits for other jobs; returns its job id.

    Raises:
        SlurmError: Slurm refuses it, or would let it wait for ever; nothing is left in the queue.
    """
    dependency = [f"--dependency={condition}:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    job = run(["sbatch", "--parsable", *dependency, script]).split(";")[0]
    # Many clusters accept a longer job than the partition allows, and then never start it.
    asked, allowed = _shown("job", job, "TimeLimit"), _shown("partition", _shown("job", job, "Partition"), "MaxTime")
    if _shown("job", job, "QOS") in ("", "normal", "(null)") and _seconds(asked) > _seconds(allowed):
        cancel([job])
        raise SlurmError(f"{script}: time limit {asked}: the partition allows {allowed}; give a --time that it allows")
    return job


def _shown(kind: str, name: str, key: str) -> str:
    """A value that scontrol shows of a job or a partition; empty where it shows none."""
    lines = run(["scontrol", "--oneliner", "show", kind, name]).splitlines()
    found = re.search(rf"\b{key}=(\S+)", lines[0]) if lines else None
    return found.group(1) if found else ""


def _seconds(limit: str) -> float:
    """Of a time limit as scontrol shows it, [D-]HH:MM:SS; infinite where it is none."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", limit)
    if found is None:
        return float("inf")
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def cancel(jobs: Sequence[str]) -> None:
    """Cancels jobs; one that has ended is no error. Raises SlurmError."""
    if jobs:
        run(["scancel", *jobs])
