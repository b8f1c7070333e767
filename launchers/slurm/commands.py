"""Slurm's own commands."""

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from cola_megatron.errors import UserError
from launchers.slurm.site import seconds_of

__all__ = [
    "NoSlurm",
    "SlurmError",
    "cancel",
    "check_after",
    "check_array_size",
    "environment_for",
    "run",
    "submit",
    "test_only",
]

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
    "socket timed out": "Slurm may have taken the job all the same: `cola status` of its folder shows it",
    "unable to contact": "the controller does not answer: is it up (`scontrol ping`)?",
}
REFUSED_ENDS = {
    "invalid job id": "Slurm knows no such job, or has forgotten it since it ended; `cola status` shows what is there",
    "access/permission denied": "is another user's job, which Slurm does not let you end",
}
"""What scancel says of a job, and what it means."""
TIMEOUT_SECONDS = 120
UNCONFIGURED = "Could not establish a configuration source"
# Of options those variables that are not called like them, or say the same in another way.
GPUS = ("GRES", "GPUS", "GPUS_PER_NODE", "GPUS_PER_TASK", "GPUS_PER_SOCKET")
VARIABLES = {
    "time": ("TIMELIMIT",),
    "mem": ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"),
    "requeue": ("REQUEUE", "NO_REQUEUE"),
    "gres": GPUS,
    "gpus-per-node": GPUS,
}
OF_CLUSTER = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")
OF_JOB = re.compile(
    "SLURM|SRUN_|PMI|OMPI_|TORCHELASTIC_|COLA_ATTEMPT|(GROUP_|ROLE_|LOCAL_)?(RANK|WORLD_SIZE)$|ROLE_NAME$|MASTER_(ADDR|PORT)$|"
    "(CUDA|ROCR|HIP)_VISIBLE_DEVICES$|GPU_DEVICE_ORDINAL$|OMP_NUM_THREADS$"
)
NEVER_WELL = ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
JOB_ID = re.compile(r"(?P<job>[0-9]+)(;\S+)?")
"""What `sbatch --parsable` prints; on a cluster of several, with its name."""


class SlurmError(UserError):
    """There is no Slurm here, or it refuses; one line with what it said and the cure."""


class NoSlurm(SlurmError):
    """This machine has none of Slurm's commands, or they know of no cluster."""


def run(command: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """The output of one of Slurm's commands.

    Raises:
        NoSlurm: it is not there.
        SlurmError: it does not answer, or fails.
    """
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS
        )
    except FileNotFoundError:
        raise NoSlurm(
            f"{command[0]}: not found, so there is no Slurm on this machine; submit from a login node, or train here "
            "with `cola launch`"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]}: no answer within {TIMEOUT_SECONDS} s; see `scontrol ping`") from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        if UNCONFIGURED in said:
            raise NoSlurm(
                f"{command[0]}: this machine belongs to no Slurm (there is no slurm.conf); submit from a login node"
            )
        cure = next((cure for sign, cure in CURES.items() if sign in said.lower()), None)
        raise SlurmError(f"{command[0]}: {said}" + (f"; {cure}" if cure else ""))
    return done.stdout.strip()


def test_only(script: str) -> str:
    """Whether Slurm would take a batch script, and what it says of the start; raises SlurmError."""
    words, environment = ["sbatch", "--test-only", script], environment_for(Path(script))
    try:
        done = subprocess.run(
            words, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        run(["sbatch", "--version"])
        raise
    if done.returncode:
        run(words, environment)
    return " ".join(done.stderr.split()).removeprefix("sbatch: ")


def submit(
    script: Path, note: Path, after: Sequence[str] = (), longer_than: int = 0, after_any: Sequence[str] = ()
) -> str:
    """Submits a batch script that waits for other jobs; returns its job id.

    Args:
        note: takes the id in a line of its own, before anything else can go wrong.
        longer_than: seconds that the time limit has to exceed.
        after_any: jobs that must have ended as well, well or not.

    Raises:
        SlurmError: Slurm refuses it, or would let it wait for ever; nothing is left in the queue.
        OSError: the id cannot be noted; nothing is left in the queue.
    """
    waits = [f"{kind}:{':'.join(jobs)}" for kind, jobs in (("afterok", after), ("afterany", after_any)) if jobs]
    dependency = [f"--dependency={','.join(waits)}", "--kill-on-invalid-dep=yes"] if waits else []
    said = run(["sbatch", "--parsable", *dependency, str(script)], environment_for(script))
    # Some clusters greet their users here.
    found = [line for line in map(JOB_ID.fullmatch, said.splitlines()) if line is not None]
    if not found:
        raise SlurmError(f"sbatch: no job id in {' '.join(said.split())!r}; see `squeue --me` for a job that it made")
    job = found[-1].group("job")
    try:
        with note.open("a", encoding="utf-8") as file:
            file.write(f"{job}\n")
    except OSError:
        cancel([job])
        raise
    _check_time_limit(script, job, longer_than)
    return job


def _check_time_limit(script: Path, job: str, longer_than: int) -> None:
    """Many clusters accept a longer job than the partition allows, and then never start it; raises SlurmError.

    What the limit is may be known only now: where the site says nothing, the partition does.
    """
    try:
        asked = _shown("job", job, "TimeLimit")
        allowed = _shown("partition", _shown("job", job, "Partition"), "MaxTime")
        free = _shown("job", job, "QOS") not in ("", "normal", "(null)")  # may allow more
    except SlurmError:
        return  # the job is there, and Slurm says so when it can
    if seconds_of(asked) <= longer_than:
        cancel([job])
        raise SlurmError(
            f"{script}: time limit {asked}: the run is told to stop {longer_than} s before it, and would never train; "
            "give a longer --time, or a smaller signal_seconds"
        )
    if not free and seconds_of(asked) > seconds_of(allowed):
        cancel([job])
        raise SlurmError(f"{script}: time limit {asked}: the partition allows {allowed}; give a --time that it allows")


def environment_for(script: Path) -> dict[str, str]:
    """The environment in which sbatch does what a script says.

    Sbatch's own variables ($SBATCH_PARTITION, ...) go before the options of a script: those that would replace one are
    left out. Those of a job that this is called from, its memory and its place among other processes, are not the new
    job's.
    """
    written = set(re.findall(r"^#SBATCH '?--([a-z-]+)", script.read_text(encoding="utf-8"), re.MULTILINE))
    hidden = {"SBATCH_ARRAY_INX"}  # what is no array stays none
    for option in written:
        hidden |= {f"SBATCH_{name}" for name in VARIABLES.get(option, (option.upper().replace("-", "_"),))}
    inside = "SLURM_JOB_ID" in os.environ
    return {
        name: value
        for name, value in os.environ.items()
        if name not in hidden and not (inside and name not in OF_CLUSTER and OF_JOB.match(name))
    }


def _shown(kind: str, name: str, key: str) -> str:
    """A value that scontrol shows of a job or a partition; empty where it shows none."""
    lines = run(["scontrol", "--oneliner", "show", kind, name]).splitlines()
    found = re.search(rf"\b{key}=(\S+)", lines[0]) if lines else None
    return found.group(1) if found else ""


def check_after(jobs: Sequence[str]) -> None:
    """Refuses to wait for jobs that have failed or that Slurm does not know; raises SlurmError."""
    for job in jobs:
        if re.fullmatch("[0-9]+(_[0-9]+)?", job) is None:
            raise SlurmError(f"--after {job}: not the id of a job, such as 4711 or 4711_3")
        try:
            shown = run(["scontrol", "--oneliner", "show", "job", job])
        except SlurmError as error:
            if "Invalid job id" not in str(error):
                raise
            raise SlurmError(
                f"--after {job}: Slurm knows no such job, or has forgotten it since it ended; without --after nothing "
                "is waited for"
            ) from None
        for state in re.findall(r"\bJobState=(\S+)", shown):
            if state in NEVER_WELL:
                raise SlurmError(f"--after {job}: {state}, so what waits for its success would never start")


def check_array_size(elements: int, cure: str = "give them as several arrays") -> None:
    """Refuses more elements than this Slurm allows; raises SlurmError."""
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", run(["scontrol", "show", "config"]))
    if found is not None and elements > int(found.group(1)):
        raise SlurmError(f"{elements} runs: this Slurm allows arrays of {found.group(1)} (MaxArraySize); {cure}")


def cancel(jobs: Sequence[str]) -> None:
    """Cancels jobs; one that has ended and is still known is no error. Raises SlurmError."""
    if not jobs:
        return
    try:
        run(["scancel", *jobs])
    except SlurmError as error:
        refused = {
            job: why
            for sign, why in REFUSED_ENDS.items()
            for job in re.findall(rf"job id (\S+): {sign}", str(error), re.IGNORECASE)
        }
        if not refused:
            raise
        named = "; ".join(f"{job}: {why}" for job, why in sorted(refused.items()))
        others = [job for job in jobs if job not in refused]
        raise SlurmError(named + (f"; cancelled {', '.join(others)}" if others else "")) from None
