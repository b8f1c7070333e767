"""Habits of clusters and of those who submit: what surrounds a job changes nothing of it; on a real Slurm.

The Python of these jobs is a line of shell that notes its environment, so each is over in a second.
"""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from cola_megatron.config import dump_config
from tests.commands import cola
from tests.slurm_cluster import Cluster

SITE = "partition: main\ngpus_per_node: 0\nexclusive: false\npreflight: false\ntime: '60'\ntries: 1\n"


@pytest.fixture
def submit(slurm: Cluster, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """`submit(site="", **environment)`: the environment of the processes of a job that was submitted in this one."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    python, noted = tmp_path / "python", tmp_path / "noted"
    python.write_text(f'#!/bin/bash\nenv -0 > {noted}\npwd >> "{noted}.pwd"\n')
    python.chmod(0o755)
    (folder / "config.yaml").write_text(dump_config(tiny(1, "runs_folder=runs")))

    def send(site: str = "", **environment: str) -> dict[str, str]:
        (folder / "site.yaml").write_text(f"{SITE}python: {python}\n{site}")
        words = ["submit", "config.yaml", "--site", "site.yaml", "--json"]
        done = cola(*words, env={**slurm.environment, **environment})
        assert done.returncode == 0, done.stderr
        job = json.loads(done.stdout)
        log = Path(job["folder"]) / f"slurm-{job['job']}.log"
        assert slurm.run_to_the_end(job["job"]) == "COMPLETED", log.read_text()
        assert Path(f"{noted}.pwd").read_text().splitlines()[-1] == str(folder)
        found = dict(entry.split("=", 1) for entry in noted.read_text().split("\0") if "=" in entry)
        return {**found, "shown": json.dumps(slurm.job(job["job"]))}

    return send


def test_a_site_that_hands_jobs_no_environment(submit) -> None:
    found = submit("directives: [--export=NONE]\nenvironment: {COLA_MARK: 'a b'}\nfirst_port: 40000\n")
    assert found["COLA_MARK"] == "a b" and found["MASTER_ADDR"] == "n1"
    assert 40_000 <= int(found["MASTER_PORT"]) < 52_000


def test_a_job_that_is_submitted_from_inside_another(submit) -> None:
    outer = {"SLURM_JOB_ID": "7", "SLURM_MEM_PER_CPU": "100", "SLURM_NNODES": "3", "RANK": "0", "LOCAL_RANK": "1"}
    found = submit("memory_per_node: 100M\n", **outer, TORCHELASTIC_RUN_ID="x", CUDA_VISIBLE_DEVICES="3", WORLD="kept")
    assert found["WORLD"] == "kept" and found["SLURM_NNODES"] == "1"
    assert not {"RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "CUDA_VISIBLE_DEVICES", "SLURM_MEM_PER_CPU"} & found.keys()


def test_variables_of_sbatch_replace_nothing_that_was_written(submit) -> None:
    replacing = {"SBATCH_PARTITION": "high", "SBATCH_TIMELIMIT": "30", "SBATCH_NO_REQUEUE": "1"}
    shown = json.loads(submit(**replacing, SBATCH_ARRAY_INX="0-3")["shown"])
    assert (shown["Partition"], shown["TimeLimit"], shown["Requeue"]) == ("main", "01:00:00", "1")
    assert "ArrayJobId" not in shown


def test_a_set_up_may_use_variables_that_are_unset(submit) -> None:
    submit("setup: ['[ -z $COLA_NOWHERE ]']\n")


def test_to_wait_for_what_never_comes_is_refused(slurm: Cluster, tiny, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(tiny(1)))
    (tmp_path / "site.yaml").write_text(SITE + "directives: [--hold]\n")
    words = ["submit", tmp_path / "config.yaml", "--site", tmp_path / "site.yaml", "--after"]
    failed = slurm.commands("sbatch", "--parsable", "--output=/dev/null", "--wrap=exit 1")
    good = slurm.commands("sbatch", "--parsable", "--output=/dev/null", "--wrap=exit 0")
    for job in (failed, good):
        slurm.run_to_the_end(job)
    for job, said in (
        (failed, f"--after {failed}: FAILED, so what waits for its success would never start"),
        ("999999999", "--after 999999999: Slurm knows no such job"),
        ("first", "--after first: not the id of a job"),
    ):
        done = cola(*words, job, env=slurm.environment)
        assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith(f"cola: {said}"), done.stderr
    assert not tiny(1).run_folder.exists(), "nothing was written"
    assert cola(*words, good, env=slurm.environment).returncode == 0


def test_more_runs_than_an_array_may_have_are_refused(slurm: Cluster, tiny, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(tiny(1)))
    (tmp_path / "site.yaml").write_text(SITE)
    stub = tmp_path / "bin" / "scontrol"
    stub.parent.mkdir()
    stub.write_text("#!/bin/bash\necho 'MaxArraySize            = 1'\n")
    stub.chmod(0o755)
    words = ["submit", "array", tmp_path / "config.yaml", "--name", "sweep", "--site", tmp_path / "site.yaml"]
    env = {**slurm.environment, "PATH": f"{stub.parent}:{slurm.environment['PATH']}"}
    done = cola(*words, "--run", "a seed=1", "--run", "b seed=2", env=env)
    assert done.returncode == 1 and "2 runs: this Slurm allows arrays of 1 (MaxArraySize)" in done.stderr
    assert not (tiny(1).runs_folder / "sweep").exists(), "nothing was written"


# ---- docs/slurm.md, word for word -----------------------------------------------------------------------------------

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "slurm.md").read_text(encoding="utf-8")
ROAD = PAGE.split("\n## The road\n")[1].split("\n## ")[0]
COMMANDS = [" ".join(found.split()) for found in re.findall(r"`(cola (?:plan|prep|submit) [^`]+)`", ROAD)]


@pytest.fixture(scope="module")
def login_node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what the page says to have: a site file, a recipe, texts and benchmarks."""
    folder = tmp_path_factory.mktemp("login")
    (folder / "our.yaml").write_text(cola("submit", "site", "plain").stdout)
    (recipe,) = re.findall(r"```yaml\n(.*?)```", ROAD, re.DOTALL)
    (folder / "web.yaml").write_text(recipe.replace("/data/", f"{folder}/data/"))
    for name in ("crawl", "benchmarks"):
        (folder / "data" / name).mkdir(parents=True)
    (folder / "data" / "crawl" / "a.jsonl").write_text('{"text": "a text"}\n')
    return folder


def test_the_page_has_the_commands_of_the_road() -> None:
    assert [command.split()[1:3] for command in COMMANDS] == [
        ["prep", "submit"],
        ["plan", "paper-2b"],
        ["submit", "paper-2b"],
        ["submit", "pipeline"],
        ["submit", "array"],
        ["submit", "array"],
    ]


# The last needs an array that was submitted: tests/test_slurm_arrays.py.
@pytest.mark.parametrize("command", COMMANDS[:-1], ids=range(len(COMMANDS) - 1))
def test_a_command_of_the_page_runs_as_written(command: str, login_node: Path, monkeypatch) -> None:
    monkeypatch.chdir(login_node)
    words = [word.replace("/data/", f"{login_node}/data/") for word in shlex.split(command)[1:]]
    done = cola(*words, *([] if words[0] == "plan" else ["--dry-run"]))
    assert done.returncode == 0, done.stderr
