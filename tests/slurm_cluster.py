"""A real Slurm on loopback for tests: munged, slurmctld and a slurmd for each node, as children of the test.

It needs root and Debian's slurm-wlm and munge. Its GPUs are copies of /dev/null: they are scheduled, and no more.
"""

import contextlib
import json
import os
import random
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={port}
FirstJobId={first_job}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MinJobAge=3600
OverTimeLimit=1
SlurmdTimeout=10
MessageTimeout=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/completed.txt
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=DEFAULT Sockets=2 CoresPerSocket=48 ThreadsPerCore=1 RealMemory=2000000 Gres=gpu:h100:8
NodeName=n[1-{nodes}] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{last}]
PartitionName=main Nodes=ALL Default=YES MaxTime=7-0 PriorityTier=1 GraceTime=30 PreemptMode=REQUEUE State=UP
PartitionName=high Nodes=ALL MaxTime=7-0 PriorityTier=10 PreemptMode=OFF State=UP
"""
TERMINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


class Cluster:
    """A running Slurm; `environment` leads its commands there."""

    def __init__(self, folder: Path, nodes: int):
        self.folder, self.nodes = folder, nodes
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._children: dict[str, subprocess.Popen] = {}

    # ---- its life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Returns when every node is idle."""
        port = _free_ports(self.nodes + 1)
        values = {"port": port, "first": port + 1, "last": port + self.nodes, "nodes": self.nodes}
        # Jobs take their ports from their numbers, and another test run's Slurm may be on this machine.
        values["first_job"] = random.SystemRandom().randrange(1, 100_000)
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(folder=self.folder, **values).lstrip())
        for name in ("state", *(f"spool-n{node}" for node in range(1, self.nodes + 1))):
            (self.folder / name).mkdir()
        for number in range(8):
            os.mknod(self.folder / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        gpus = f"NodeName=n[1-{self.nodes}] Name=gpu Type=h100 File={self.folder}/gpu[0-7]\n"
        (self.folder / "gres.conf").write_text(gpus)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        names = " ".join(f"n{node}" for node in range(1, self.nodes + 1))
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost {names} {socket.gethostname()}\n")
        self._start_munge()
        self.start_controller("-c")
        for node in range(1, self.nodes + 1):
            self.start_node(f"n{node}")
        self.wait_for(self._idle, "all nodes idle")

    def clear(self) -> None:
        """Ends what the test before left; returns when nothing runs and every node is idle."""
        if self.commands("squeue", "--noheader"):
            self.commands("scancel", "--user=root", check=False)
        self.wait_for(lambda: not self.commands("squeue", "--noheader") and self._idle(), "all nodes idle")

    def _idle(self) -> bool:
        return set(self.states().values()) == {"idle"}

    def start_controller(self, *options: str) -> None:
        """Starts slurmctld, which knows what it knew when it was stopped."""
        self._child("slurmctld", "slurmctld", "-D", *options, "-f", str(self.folder / "slurm.conf"))

    def stop_controller(self) -> None:
        """An outage: jobs run on, and nobody answers."""
        self._children["slurmctld"].terminate()
        self._children["slurmctld"].wait()

    @contextlib.contextmanager
    def outage(self) -> Iterator[None]:
        """The controller is away for the time of the block."""
        self.stop_controller()
        try:
            yield
        finally:
            self.start_controller()
            self.wait_for(lambda: self.commands("scontrol", "ping", check=False).endswith("UP"), "a controller")

    def start_node(self, node: str) -> None:
        """Starts the slurmd of a node."""
        self._child(node, "slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf"))

    def kill_node(self, node: str) -> None:
        """A power cut: the slurmd of a node and all that it started are killed."""
        daemon = psutil.Process(self._children[node].pid)
        lost = [daemon, *self.processes(f"SLURMD_NODENAME={node}"), *self.step_daemons(node)]
        for process in lost:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._children[node].wait()

    def stop(self) -> None:
        """Ends all daemons, and whatever jobs left behind."""
        self.commands("scancel", "--user=root", check=False)
        for child in reversed(self._children.values()):
            child.terminate()
        for child in reversed(self._children.values()):
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        for process in [*self.processes(f"SLURM_CONF={self.folder}/slurm.conf"), *self.step_daemons("")]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    # ---- jobs --------------------------------------------------------------------------------------------------------

    def commands(self, *command: str, check: bool = True) -> str:
        """Runs one of Slurm's commands and returns its output."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def states(self) -> dict[str, str]:
        """Node -> state."""
        lines = self.commands("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T", check=False).splitlines()
        return dict(line.split() for line in lines if len(line.split()) == 2)

    def job(self, job: str) -> dict[str, str]:
        """What scontrol shows of a job."""
        words = self.commands("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def run_to_the_end(self, job: str, seconds: float = 400) -> str:
        """Waits until a job has ended for good, and lets it start at once after each requeue; returns its state."""

        def ended() -> bool:
            self.start_again(job)
            return self.job(job)["JobState"] in TERMINAL

        self.wait_for(ended, f"the end of job {job}", seconds, every=0.5)
        return self.job(job)["JobState"]

    def start_again(self, job: str) -> None:
        """Spares a requeued job its two minutes of waiting."""
        shown = self.job(job)
        if shown["JobState"] == "PENDING" and shown["Reason"] == "BeginTime":
            self.commands("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)

    def wait_for(self, true: Callable[[], bool], what: str, seconds: float = 240, every: float = 0.1) -> None:
        """Polls until something is so; fails the test after so many seconds, which are many for a busy machine."""
        until = time.monotonic() + seconds
        while not true():
            if time.monotonic() > until:
                raise AssertionError(f"no {what} within {seconds:g} s; {self.states()}\n{self.commands('squeue')}")
            time.sleep(every)

    # ---- processes ---------------------------------------------------------------------------------------------------

    def processes(self, variable: str) -> list[psutil.Process]:
        """The processes of this cluster's jobs whose environment has NAME=VALUE."""
        name, _, value = variable.partition("=")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                ours = environment.get("SLURM_CONF") == self.environment["SLURM_CONF"] and "SLURM_JOB_ID" in environment
                if ours and environment.get(name) == value:
                    found.append(process)
        return found

    def ranks(self) -> dict[int, psutil.Process]:
        """Rank -> its process, of the one job that trains."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment, words, parent = process.environ(), process.cmdline(), process.parent()
                ours = environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if not ours or "train" not in words or "launch" in words or "supervise.py" in " ".join(words):
                    continue
                # A loader's process looks like its rank, but for its parent: an agent, or a task of srun's none.
                if "RANK" in environment and "RANK" not in parent.environ():
                    found[int(environment["RANK"])] = process
                elif "RANK" not in environment and "slurmstepd" in parent.name():
                    found[int(environment["SLURM_PROCID"])] = process
        return found

    def step_daemons(self, node: str) -> list[psutil.Process]:
        """The slurmstepd processes of a node ("": of all), those of batch scripts among them."""
        found, ours = [], f"SLURM_CONF={self.folder}/".encode()
        tasks = {process.pid for process in self.processes(f"SLURMD_NODENAME={node}")} if node else set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                # Its title is written over the start of its environment, and psutil reads to the first gap.
                if "slurmstepd" not in process.name() or ours not in Path(f"/proc/{process.pid}/environ").read_bytes():
                    continue
                if not node or tasks.intersection(child.pid for child in process.children()):
                    found.append(process)
        return found

    # ---- its daemons -------------------------------------------------------------------------------------------------

    def _start_munge(self) -> None:
        files = {
            "--key-file": "munge.key",
            "--socket": "munge.socket",
            "--pid-file": "munged.pid",
            "--log-file": "munged.own.log",
            "--seed-file": "munge.seed",
        }
        words = [word for option, name in files.items() for word in (option, str(self.folder / name))]
        self._child("munged", "munged", "-F", *words, private_hosts=False)
        self.wait_for((self.folder / "munge.socket").exists, "munge's socket")

    def _child(self, name: str, *command: str, private_hosts: bool = True) -> None:
        if private_hosts:  # so that n1, n2, ... lead here for the daemons and all jobs
            bind = 'mount --make-rprivate / && mount --bind "$0" /etc/hosts && exec "$@"'
            command = ("unshare", "-m", "sh", "-c", bind, str(self.folder / "hosts"), *command)
        with (self.folder / f"{name}.log").open("a") as log:
            self._children[name] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )


@contextlib.contextmanager
def cluster(nodes: int = 2) -> Iterator[Cluster]:
    """A Slurm for the time of the block; skips the test where there is none on this machine."""
    missing = [command for command in ("slurmctld", "slurmd", "munged", "unshare") if shutil.which(command) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: apt-get install -y --no-install-recommends slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("slurmd and its private /etc/hosts need root")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    running = Cluster(folder, nodes)
    try:
        running.start()
        yield running
    finally:
        running.stop()
        shutil.rmtree(folder, ignore_errors=True)


def records(path: Path) -> list[dict]:
    """The lines of a .jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _free_ports(count: int) -> int:
    """The first of so many free ports in a row."""
    for base in random.SystemRandom().sample(range(18000, 20000, 64), 31):
        with contextlib.ExitStack() as held:
            try:
                for port in range(base, base + count):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return base
    raise RuntimeError("no free ports in a row")
