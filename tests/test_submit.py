"""`cola submit`: the scripts that it writes, what it keeps beside them, and what it refuses."""

import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cola_megatron.config import ConfigError, dump_config, load_config
from cola_megatron.errors import ExitCode
from launchers.cli import app
from launchers.slurm.array import configs_of
from launchers.slurm.render import Shape, training_script
from launchers.slurm.site import load_site, site_names
from slurm import supervise
from tests.commands import cola
from tests.ranks import free_port
from tests.slurm_cluster import Cluster
from tests.support import TINY, small_disk

STORED = Path(__file__).parent / "data" / "slurm"
CPU_SITE = "partition: main\ngpus_per_node: 0\nexclusive: false\n"


@pytest.fixture
def on_a_login_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a config and a site file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLA_SITE", raising=False)
    config = load_config("tiny", [*TINY, "stage=1", "data.path=data", "name=first"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    (tmp_path / "site.yaml").write_text(CPU_SITE)
    return tmp_path


def one_line(done: subprocess.CompletedProcess) -> str:
    """The one line that a refused command printed."""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("cola: ") and done.stdout == ""
    return line


# ---- the scripts ----------------------------------------------------------------------------------------------------


def rendered(site: str, array: str | None = None) -> str:
    """The script of an example site, for 4 nodes."""
    chosen = load_site(site, ["python=/opt/venv/bin/python"])
    shape, folder = Shape(4, chosen.gpus_per_node), Path("/work/runs/first/submissions/0001")
    return training_script(chosen, shape, "first", folder, Path("/work"), array)


@pytest.mark.parametrize("site", site_names())
def test_scripts_of_the_example_sites_are_the_stored_ones(site: str) -> None:
    """To store them anew after a change of a template: COLA_STORE=1 pytest tests/test_submit.py."""
    stored = STORED / f"{site}.sbatch"
    if os.environ.get("COLA_STORE"):
        stored.write_text(rendered(site))
    assert rendered(site) == stored.read_text()


@pytest.mark.parametrize("array", [None, "0-3%2"])
@pytest.mark.parametrize("site", site_names())
def test_scripts_are_good_shell(site: str, array: str | None, tmp_path: Path) -> None:
    script = tmp_path / "job.sbatch"
    script.write_text(rendered(site, array))
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here: apt-get install shellcheck")
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_words_reach_the_supervisor_as_they_are(tmp_path: Path) -> None:
    """Blanks and quotes in names survive the script, its arrays and the supervisor's reading of them."""
    site = load_site("plain", ["gpus_per_node=0", "modules=[]", "supervisor_python=echo", "preflight=false"])
    folder = tmp_path / "it's a run" / "submissions" / "0001"
    script = training_script(site, Shape(1, 1), "x", folder, tmp_path).replace("exec echo", 'exec printf "%s\\n"')
    done = subprocess.run(
        ["bash", "-c", f"scontrol() {{ echo n1; }}\n{script}"],
        env={**os.environ, "SLURM_JOB_NODELIST": "n1"},
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.splitlines()
    assert words[words.index("--folder") + 1] == str(folder)
    assert words[words.index("--run-folder") + 1] == str(folder.parent.parent)
    assert shlex.split(words[words.index("--train") + 1])[-2:] == ["train", f"{folder}/config.yaml"]


def test_the_first_of_very_many_nodes(tmp_path: Path) -> None:
    """A reader that closes its end after the first name ended the script at random."""
    settings = ["gpus_per_node=0", "modules=[]", "supervisor_python=echo", "preflight=false", "address_suffix=-ib0"]
    script = training_script(load_site("plain", settings), Shape(1, 1), "x", tmp_path, tmp_path)
    done = subprocess.run(
        ["bash", "-c", f"scontrol() {{ seq 99999; }}\n{script.replace('exec echo', 'echo $MASTER_ADDR')}"],
        env={**os.environ, "SLURM_JOB_NODELIST": "n[1-99999]"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[0] == "1-ib0"


def test_a_dry_run_prints_and_writes_nothing(on_a_login_node: Path) -> None:
    done = CliRunner().invoke(app, ["submit", "config.yaml", "--site", "site.yaml", "--nodes", "2", "--dry-run"])
    assert done.exit_code == 0 and done.output.startswith("#!/bin/bash\n")
    assert not (on_a_login_node / "runs").exists()


def test_apptainer_starts_every_process(tmp_path: Path) -> None:
    container = '{"kind": "apptainer", "image": "/images/cola.sif", "mounts": ["/data:/data"]}'
    site = load_site("plain", [f"container={container}"])
    script = training_script(site, Shape(2, 8), "x", tmp_path, tmp_path)
    assert "apptainer exec --nv --bind /data:/data /images/cola.sif python -m cola_megatron launch" in script


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpu_per_node: 4", "did you mean gpus_per_node"),
        ("time: 14400", "in quotes"),
        ("launcher: mpi", "agent"),
        ("directives: [exclusive]", "--name=value"),
        ("environment: {A B: c}", "no name of a variable"),
        ("container: {kind: docker, image: x}", "pyxis"),
    ],
)
def test_a_site_file_that_cannot_work_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        load_site(str(tmp_path / "site.yaml"))
    assert "\n" not in str(caught.value)


def test_an_unknown_site_names_the_examples() -> None:
    with pytest.raises(ConfigError, match="cloud-efa, container, plain"):
        load_site("nowhere")


def test_an_example_is_printed_to_be_filled_in(tmp_path: Path) -> None:
    done = cola("submit", "site", "cloud-efa")
    assert done.returncode == 0 and "partition: p5" in done.stdout
    assert "there are cloud-efa, container, plain" in one_line(cola("submit", "site", "nowhere"))


def test_the_site_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ours.yaml").write_text("gpus_per_node: 4")
    monkeypatch.setenv("COLA_SITE", str(tmp_path / "ours.yaml"))
    assert load_site(None).gpus_per_node == 4
    assert load_site(None, ["gpus_per_node=2", "time=4:00:00"]).time == "4:00:00"


def test_without_slurm_it_says_so(on_a_login_node: Path) -> None:
    done = cola("submit", "config.yaml", "--site", "site.yaml", env={**os.environ, "PATH": str(on_a_login_node)})
    assert done.returncode == 1
    assert "sbatch: not found, so there is no Slurm on this machine" in one_line(done)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["parallel.tensor_parallel_size=2", "--nodes", 3], "3 is not divisible by tensor_parallel_size=2"),
        (["--nodes", 3], "global_batch_size"),
        (["--set", "gpus_per_node=4", "--processes", 8], "have 4 GPUs"),
        (["--set", "gpu_per_node=4"], "did you mean gpus_per_node"),
    ],
)
def test_what_the_job_would_refuse_is_refused_here(on_a_login_node: Path, arguments: list, said: str) -> None:
    done = cola("submit", "config.yaml", *arguments, "--site", "site.yaml", "--dry-run")
    assert done.returncode == 2
    assert said in one_line(done)


def test_a_full_disk_is_one_line(on_a_login_node: Path) -> None:
    with small_disk(on_a_login_node / "disk", 16) as disk:
        (disk / "filler").write_bytes(bytes(8192))
        done = cola("submit", "config.yaml", f"runs_folder={disk}", "--site", "site.yaml")
    assert done.returncode == 1
    assert re.search(r"submissions/0001/\S+: No space left on device", one_line(done))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--partition", "nowhere"], "invalid partition specified: nowhere.*`sinfo` lists them"),
        (["--set", "gpus_per_node=16", "--processes", "2"], "no node of the partition has so many GPUs"),
        (["--nodes", "4", "training.micro_batch_size=1"], "lower --nodes|no node of the partition"),
        (["--time", "100-00:00:00"], "time limit 100-00:00:00: the partition allows 7-00:00:00; give a --time"),
    ],
)
def test_what_slurm_refuses_is_one_line(on_a_login_node: Path, slurm: Cluster, arguments: list, said: str) -> None:
    done = cola("submit", "config.yaml", *arguments, "--site", "site.yaml", env=slurm.environment)
    assert done.returncode == 1
    assert re.search(said, one_line(done)), done.stderr
    assert slurm.commands("squeue", "--noheader") == ""


def test_a_tested_submission_is_not_submitted(on_a_login_node: Path, slurm: Cluster) -> None:
    done = cola("submit", "config.yaml", "--site", "site.yaml", "--test-only", "--json", env=slurm.environment)
    answer = json.loads(done.stdout)
    assert answer["job"] is None and "to start at" in answer["slurm"]
    assert slurm.commands("squeue", "--noheader") == ""
    assert (Path(answer["folder"]) / "job.sbatch").is_file()


def test_secrets_are_not_stored(on_a_login_node: Path, slurm: Cluster) -> None:
    secrets = {
        "WANDB_API_KEY": "s3cret",
        "HTTPS_PROXY": "http://user:s3cret@proxy:3128",
        "DATABASE_URL": "postgres://s3cret",
        "MYSQL_PWD": "s3cret",
        "SSHPASS": "s3cret",
        "NCCL_TOKEN": "s3cret",
        "TORCH_HUB": "https://user:s3cret@hub",
    }
    env = {**slurm.environment, **secrets, "NCCL_DEBUG": "INFO"}
    answer = json.loads(cola("submit", "config.yaml", "--site", "site.yaml", "--test-only", "--json", env=env).stdout)
    path = Path(answer["folder"]) / "environment.txt"
    text = path.read_text()
    assert "s3cret" not in text and "NCCL_DEBUG=INFO" in text and "torch==" in text
    assert all(f"{name}=(left out)" in text for name in secrets)
    assert path.stat().st_mode & 0o777 == 0o600


# ---- arrays ---------------------------------------------------------------------------------------------------------


def test_runs_of_an_array() -> None:
    base = [*TINY, "stage=1", "runs_folder=out"]
    low, other = configs_of("sweep", "tiny", base, ["low seed=1", "other tiny seed=2"])
    assert (low.name, low.seed, str(low.run_folder)) == ("low", 1, "out/sweep/low")
    assert (other.name, other.seed, str(other.run_folder)) == ("other", 2, "out/sweep/other")
    for lines, said in (
        ([], "needs runs"),
        (["a seed=1", "a seed=2"], "two names"),
        (["a sead=1"], "run a: .*did you mean seed"),
        (["a small base"], "small and base are two configs"),
        (["../a seed=1"], "--run '../a': the name of a folder"),
        ([""], "--run '': the name of a folder"),
        (["a data.path='x"], "No closing quotation"),
    ):
        with pytest.raises(ConfigError, match=said):
            configs_of("sweep", "tiny", base, lines)
    for name in ("../x", "", "..", "a b"):
        with pytest.raises(ConfigError, match=r"--name .*: the name of a folder"):
            configs_of(name, "tiny", base, ["a seed=1"])


# ---- one process per GPU, here --------------------------------------------------------------------------------------


def test_launch_ends_as_its_processes_end(on_a_login_node: Path) -> None:
    done = cola("launch", "--nproc", 2, "train", "config.yaml", "nonsense=1")
    assert done.returncode == ExitCode.WRONG_USE
    assert "unknown key" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("words", ["nosuch", "train nosuch", "train tiny --nosuch"])
def test_what_is_wrong_with_a_command_is_said_once(on_a_login_node: Path, words: str) -> None:
    done = cola("launch", "--nproc", 2, *words.split())
    assert done.returncode == ExitCode.WRONG_USE
    assert done.stderr.count("nosuch") == 1 and "Traceback" not in done.stderr


def test_what_is_wrong_for_another_process_alone_is_said_too(on_a_login_node: Path) -> None:
    for words, said in ((["nosuch"], "No such command 'nosuch'"), (["train", "nosuch"], "nosuch: neither a config")):
        done = cola(*words, env={**os.environ, "RANK": "1"})
        assert done.returncode == ExitCode.WRONG_USE and done.stderr.startswith(f"cola: {said}")


def test_a_rendezvous_on_a_port_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = ["launch", "--nproc", 1, "--nodes", 2, "--node-rank", 0, "--rendezvous", address]
        done = cola(*command, "--rendezvous-seconds", 10, "train", "tiny")
    assert done.returncode == ExitCode.CRASHED
    assert one_line(done).startswith(f"cola: {address}: 2 nodes did not meet there")


@pytest.mark.slow
def test_a_node_that_does_not_answer_is_named() -> None:
    command = [sys.executable, "-m", "launchers.cli", "launch", "--nproc", "1", "--nodes", "3"]
    command += ["--rendezvous", f"127.0.0.1:{free_port()}"]
    began = time.monotonic()
    nodes = [
        subprocess.Popen(
            [*command, "--node-rank", str(rank), "--rendezvous-seconds", str(seconds), "train", "tiny"],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, seconds in ((0, 10), (1, 60))
    ]
    first, second = (node.communicate()[1] for node in nodes)
    assert time.monotonic() - began < 50, "the first node gave up after the seconds that it was given"
    assert [node.returncode for node in nodes] == [ExitCode.CRASHED, ExitCode.RANK_LOST]
    assert second.splitlines() == ["cola: node 1: the first node is gone"]
    (line,) = first.splitlines()
    assert "node 0 of 3 had no answer from node 2 within 10 s" in line
    reports = {}
    supervise.pass_on(io.BytesIO(first.encode()), [], reports, [])
    assert supervise.silent_nodes(reports) == [2]


# ---- the supervisor -------------------------------------------------------------------------------------------------


def test_its_exit_codes_are_ours() -> None:
    for name in ("DONE", "FAILED", "WRONG_USE", "CRASHED", "RANK_LOST", "BAD_NODE", "DIVERGED", "STOPPED"):
        assert getattr(supervise, name) == ExitCode[name]
    assert set(supervise.FINAL) == {code for code in ExitCode if code and not code.is_worth_another_try}


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([0, 0], 0),
        ([71, 137, 71], 137),
        ([71, 71], 71),
        ([71, 1, 71], 1),
        ([75, 75], 75),
        ([75, 71], 75),
        ([73, 73], 73),
        ([72, 72, 71], 72),
        ([2, 75], 2),
    ],
)
def test_the_decisive_exit_code(codes: list[int], code: int) -> None:
    assert supervise.decisive(codes) == code


@pytest.mark.parametrize(
    ("reports", "silent"),
    [
        ({}, []),
        ({0: {1, 3}}, [1, 3]),
        ({1: {0}}, [0]),
        ({1: {0}, 2: {0}, 3: {0}, 0: {1, 2, 3}}, [0]),
        ({0: {3}, 3: {0}}, [3]),
    ],
)
def test_which_nodes_are_silent(reports: dict[int, set[int]], silent: list[int]) -> None:
    assert supervise.silent_nodes(reports) == silent


def history(*tries: tuple[int, int | None, str | None]) -> list[dict]:
    """Events of tries: (checkpoint at the start, exit code or None for a try without an end, signal)."""
    events = []
    for checkpoint, code, signal in tries:
        events.append({"event": "try", "checkpoint": checkpoint})
        if code is not None:
            events.append({"event": "end", "code": code, "signal": signal})
    return events


@pytest.mark.parametrize(
    ("tries", "checkpoint", "count"),
    [
        ([(-1, 137, None)], -1, 1),
        ([(-1, 137, None)], 10, 0),
        ([(-1, 137, None), (10, 71, None), (10, 72, None)], 10, 2),
        ([(10, None, None), (10, 137, None)], 10, 2),
        ([(10, 137, None), (10, 75, None), (10, 137, None)], 10, 1),
        ([(10, 137, None), (10, 138, "SIGUSR1"), (10, 137, None)], 10, 1),
    ],
)
def test_fruitless_tries(tries: list, checkpoint: int, count: int) -> None:
    assert supervise.fruitless_tries(history(*tries), checkpoint) == count
