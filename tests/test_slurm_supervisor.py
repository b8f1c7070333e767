"""`slurm/supervise.py` in jobs of a real Slurm whose steps are lines of shell: what it makes of what it meets."""

import argparse
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from slurm import supervise
from tests.slurm_cluster import Cluster, records
from tests.support import small_disk

SUPERVISE = Path(supervise.__file__)
# A rank that saves and ends when it is told to, or when it is let go.
PATIENT = "trap 'exit 75' USR1; until [ -e {go} ]; do sleep 0.1; done"


class Supervised:
    """A job of which the supervisor runs a line of shell as its training."""

    def __init__(self, slurm: Cluster, run_folder: Path, job: str, folder: Path):
        self.slurm, self.run_folder, self.id, self.folder = slurm, run_folder, job, folder

    def events(self, kind: str) -> list[dict]:
        path = self.folder / "events.jsonl"
        return [event for event in records(path) if event["event"] == kind] if path.exists() else []

    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text() if path.exists() else ""

    def state(self) -> str:
        return self.slurm.job(self.id)["JobState"]

    def wait_for(self, kind: str, number: int = 1) -> None:
        self.slurm.wait_for(lambda: len(self.events(kind)) >= number, f"{kind} {number}: {self.log()}")

    def supervisor(self) -> psutil.Process:
        processes = self.slurm.processes(f"SLURM_JOB_ID={self.id}")
        return next(process for process in processes if str(SUPERVISE) in process.cmdline())


@pytest.fixture
def supervised(slurm: Cluster, tmp_path: Path) -> Callable[..., Supervised]:
    """`supervised(line, options=(), sbatch=(), directives=())`: a job of the run in tmp_path/run."""
    run_folder = tmp_path / "run"

    def send(
        line: str, options: tuple[str, ...] = (), sbatch: tuple[str, ...] = (), directives: tuple[str, ...] = ()
    ) -> Supervised:
        folder = run_folder / "submissions" / "0001"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "line").write_text(line)
        script = folder / "job.sbatch"
        lines = [
            "#!/bin/bash",
            *(f"#SBATCH {directive}" for directive in directives),
            f"folder={folder}${{SLURM_ARRAY_TASK_ID:+/$SLURM_ARRAY_TASK_ID}}",
            "mkdir -p $folder",
            f"exec {sys.executable} {SUPERVISE} --folder $folder --run-folder {run_folder} --pause 0.2 "
            f"{' '.join(options)} --train 'srun --kill-on-bad-exit=0 bash {folder}/line'",
        ]
        script.write_text("".join(f"{line}\n" for line in lines))
        words = ["--nodes=1", "--ntasks-per-node=1", f"--output={folder}/log", "--open-mode=append", "--requeue"]
        job = slurm.commands("sbatch", "--parsable", *words, *sbatch, str(script))
        return Supervised(slurm, run_folder, job, folder)

    return send


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> supervise.Supervisor:
    """A supervisor in this process, whose Slurm is the commands in tmp_path/bin."""
    for name, value in (
        ("SLURM_JOB_ID", "12"),
        ("SLURM_JOB_NODELIST", "n1"),
        ("PATH", f"{tmp_path}/bin:/usr/bin:/bin"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(supervise.signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(supervise, "ASK_AGAIN_SECONDS", 0)
    (tmp_path / "bin").mkdir()
    options = argparse.Namespace(folder=str(tmp_path), run_folder=str(tmp_path), preflight="", tries=3, patience=60)
    return supervise.Supervisor(options)


def command(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/bash\n{line}\n")
    path.chmod(0o755)


def test_an_element_of_an_array_is_requeued_alone(supervised, slurm: Cluster, tmp_path: Path) -> None:
    """The last element that starts has the array's id as its own."""
    job = supervised(PATIENT.format(go=tmp_path / "go"), sbatch=("--array=0-1",))
    slurm.wait_for(lambda: len(list(job.folder.glob("*/events.jsonl"))) == 2, "two elements")
    namesake = next(name for name in ("0", "1") if slurm.job(f"{job.id}_{name}")["JobId"] == job.id)
    other = "1" if namesake == "0" else "0"
    slurm.commands("scancel", "--batch", "--signal=USR1", f"{job.id}_{namesake}")
    slurm.wait_for(lambda: slurm.job(f"{job.id}_{namesake}")["JobState"] == "PENDING", "the requeue")
    shown = slurm.job(f"{job.id}_{other}")
    assert (shown["JobState"], shown["Restarts"]) == ("RUNNING", "0")
    (tmp_path / "go").touch()
    for name in ("0", "1"):
        assert slurm.run_to_the_end(f"{job.id}_{name}") == "COMPLETED"


@pytest.mark.slow
def test_a_requeue_waits_for_the_controller(supervised, slurm: Cluster, tmp_path: Path) -> None:
    job = supervised(PATIENT.format(go=tmp_path / "go"))
    job.wait_for("try")
    supervisor = job.supervisor()
    with slurm.outage():
        supervisor.send_signal(signal.SIGUSR1)
        slurm.wait_for(lambda: "Slurm does not answer" in job.log(), "the question")
    (tmp_path / "go").touch()
    assert slurm.run_to_the_end(job.id) == "COMPLETED", job.log()
    assert len(job.events("try")) == 2


@pytest.mark.slow
def test_an_srun_without_a_controller_is_no_failure_of_the_program(supervised, slurm: Cluster, tmp_path: Path) -> None:
    """One try fails by itself; those that no controller let begin do not count, and end no job."""
    line = f"[ -e {tmp_path}/second ] && exit 0; until [ -e {tmp_path}/go ]; do sleep 0.1; done; exit 70"
    job = supervised(line, options=("--tries=2", "--patience=0"))
    job.wait_for("try")
    with slurm.outage():
        (tmp_path / "go").touch()
        job.wait_for("end", 2)
        (tmp_path / "second").touch()
    assert slurm.run_to_the_end(job.id) == "COMPLETED", job.log()
    first, second = job.events("end")[:2]
    assert (first["code"], first["outage"]) == (70, False)
    assert (second["code"], second["outage"]) == (70, True)


@pytest.mark.parametrize(
    "said", ["Unable to contact slurm controller (connect failure)", "Unexpected message received"]
)
def test_a_controller_that_does_not_answer_is_asked_again(alone, tmp_path: Path, said: str) -> None:
    line = (
        f"echo >> {tmp_path}/asked; [ $(wc -l < {tmp_path}/asked) -ge 4 ] || {{ echo '{said}' >&2; exit 1; }}; echo yes"
    )
    command(tmp_path / "bin" / "scontrol", line)
    assert alone.ask("scontrol", "requeue", "12") == ("yes\n", "")
    command(tmp_path / "bin" / "scontrol", "echo 'Requested operation is presently disabled' >&2; exit 1")
    assert alone.ask("scontrol", "requeue", "12") == ("", "Requested operation is presently disabled")


@pytest.mark.parametrize(
    ("line", "code", "outage"),
    [
        (
            "echo 'srun: error: Unable to confirm allocation for job 12: Unable to contact' >&2",
            70,
            True,
        ),
        ("echo 'srun: error: Unable to create step for job 12: Job/step already completing' >&2", 70, False),
        ("echo 'srun: error: n1: task 0: Exited with exit code 1' >&2", 1, False),
        ("echo 'cola: data: no such folder' >&2", 1, False),
    ],
)
def test_what_srun_says_of_itself_is_no_end_of_the_program(alone, tmp_path: Path, line, code, outage) -> None:
    command(tmp_path / "bin" / "scontrol", "echo n1")
    command(tmp_path / "bin" / "srun", f"{line}; exit 1")
    assert (alone.srun("srun train")[0], alone.srun("srun train")[2]) == (code, outage)


FAILS_ON_ONE = "[ $SLURMD_NODENAME != n1 ] || kill -9 $$"


def test_the_nodes_that_the_user_left_out_stay_out(supervised, slurm: Cluster) -> None:
    job = supervised(FAILS_ON_ONE, sbatch=("--exclude=n3",))
    assert slurm.run_to_the_end(job.id) == "COMPLETED", job.log()
    assert slurm.job(job.id)["ExcNodeList"] == "n1,n3"
    assert [event["nodes"] for event in job.events("try")] == [["n1"], ["n1"], ["n2"]]


def test_a_bad_node_is_kept_where_no_other_has_what_the_job_needs(supervised, slurm: Cluster) -> None:
    """Without it the job would wait for ever."""
    slurm.commands("scontrol", "update", "NodeName=n1", "AvailableFeatures=ib", "ActiveFeatures=ib")
    job = supervised(FAILS_ON_ONE, directives=("--constraint=ib",))
    assert slurm.run_to_the_end(job.id) == "FAILED", job.log()
    slurm.commands("scontrol", "update", "NodeName=n1", "AvailableFeatures=", "ActiveFeatures=")
    assert "n1 failed, but no 1 other nodes do for this job" in job.log()
    assert "3 tries in a row brought no new checkpoint" in job.log()


def test_a_first_node_without_an_address_is_named(alone, tmp_path: Path, monkeypatch, capfd) -> None:
    def unknown(name: str, port: None) -> list:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setenv("MASTER_ADDR", "n1-ib0")
    monkeypatch.setattr(supervise.socket, "getaddrinfo", unknown)
    command(tmp_path / "bin" / "squeue", "")
    assert alone.run() == supervise.FAILED
    assert "n1-ib0: the first node's name has no address; see address_suffix" in capfd.readouterr().err


def test_a_second_job_of_a_run_ends_at_once_and_blames_no_node(supervised, slurm: Cluster, tmp_path: Path) -> None:
    first = supervised(PATIENT.format(go=tmp_path / "go"))
    first.wait_for("try")
    second = supervised(PATIENT.format(go=tmp_path / "go"))
    slurm.wait_for(lambda: second.state() == "FAILED", "the end of the second job")
    assert f"job {first.id} trains this run already" in second.log()
    assert [event["job"] for event in first.events("try")] == [first.id]
    (tmp_path / "go").touch()
    assert slurm.run_to_the_end(first.id) == "COMPLETED"


def test_a_script_submitted_by_hand_is_noted_and_begins_to_count_anew(supervised, slurm: Cluster) -> None:
    job = supervised("exit 70", options=("--tries=2",))
    assert slurm.run_to_the_end(job.id) == "FAILED"
    again = supervised("exit 70", options=("--tries=2",))
    assert slurm.run_to_the_end(again.id) == "FAILED"
    assert [event["job"] for event in job.events("try")] == [job.id] * 2 + [again.id] * 2
    assert (job.folder / "job_id").read_text().split() == [job.id, again.id]


def test_a_full_disk_does_not_end_the_supervisor(tmp_path: Path) -> None:
    """Neither its records nor its log can be written: the training runs on, and the next job reads what is left."""
    (tmp_path / "bin").mkdir()
    for name, line in (
        ("scontrol", "echo n1"),
        ("squeue", ""),
        ("sinfo", "echo n1"),
        ("srun", "seq 99999 >&2; exit 0"),
    ):
        command(tmp_path / "bin" / name, line)
    environment = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n1", "PATH": f"{tmp_path}/bin:/usr/bin:/bin"}
    with small_disk(tmp_path / "run", 64) as disk:
        words = [sys.executable, str(SUPERVISE), "--folder", str(disk), "--run-folder", str(disk), "--train", "srun"]
        with (disk / "log").open("w") as log:
            done = subprocess.run(words, env=environment, stderr=log, timeout=60)
        assert done.returncode == 0
        assert (disk / "log").stat().st_size > 50_000, "the disk was full"
        (disk / "log").unlink()
        assert subprocess.run(words, env=environment, stderr=subprocess.DEVNULL).returncode == 0
        assert supervise.read_events(str(disk / "events.jsonl"))[-1]["code"] == 0


def test_torn_records_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event": "try", "job": "12"}\n{"event": "en\n\0\0\0\0\n[1]\n{"event": "st')
    assert supervise.append(str(path), '{"event": "stop"}') == ""
    assert [event["event"] for event in supervise.read_events(str(path))] == ["try", "stop"]


def test_stays_that_never_save_a_step_come_to_an_end(supervised, slurm: Cluster) -> None:
    """As with a time limit that is not longer than signal_seconds: each stay is told to stop before its first step."""
    assert supervise.tries_in_vain([{"event": "try", "checkpoint": each} for each in (-1, 5, 10, 10)], 10) == 2
    job = supervised("exit 75", options=("--tries=2",))
    (job.folder / "events.jsonl").write_text(
        "".join(f'{{"event": "try", "job": "{job.id}", "checkpoint": -1}}\n' for _ in range(supervise.IN_VAIN - 1))
    )
    assert slurm.run_to_the_end(job.id) == "FAILED"
    assert "10 tries in a row ended before they could save a step; give a longer --time" in job.log()
