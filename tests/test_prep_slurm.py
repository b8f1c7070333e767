"""`cola prep submit`: what it hands to Slurm, and that the same tasks run from there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from launchers.cli import app
from tests.support import make_text, prepared


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    make_text(tmp_path / "text.jsonl", documents=90)
    tree = {
        "output": str(tmp_path / "out"),
        "sources": [{"name": "text", "inputs": [str(tmp_path / "text.jsonl")]}],
        "tokenizer": {"vocab_size": 300},
        "packing": {"sequence_length": 32},
        "held_out_fraction": 0.1,
        "task_bytes": 8000,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for Slurm's commands: sbatch records what it is given, and can be told to refuse."""
    commands = tmp_path / "bin"
    commands.mkdir()
    log = tmp_path / "sbatch.log"
    (commands / "sbatch").write_text(
        f"""#!/bin/bash
        if [ -e {tmp_path}/refuse-$(wc -l < {log}) ]; then echo "sbatch: error: invalid partition" >&2; exit 1; fi
        echo "$@" >> {log}
        echo $((100 + $(wc -l < {log})))
        """
    )
    for name in ("scontrol", "squeue"):
        (commands / name).write_text("#!/bin/bash\n")
    (commands / "scancel").write_text(f'#!/bin/bash\necho scancel "$@" >> {log}\n')
    log.touch()
    for command in commands.iterdir():
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")
    return log


def run(*arguments: object):
    return CliRunner().invoke(app, ["prep", *map(str, arguments)])


def test_each_step_is_an_array_after_the_one_before(recipe: Path, slurm: Path, tmp_path: Path) -> None:
    done = run("submit", "--recipe", recipe, "--elements", 2, "--concurrency", 1, "--directive=--partition=cpu")
    assert done.exit_code == 0, done.output
    calls = slurm.read_text().splitlines()
    assert len(calls) == 3 and "--dependency" not in calls[0]
    assert "--dependency=afterok:101" in calls[1] and "--dependency=afterok:102" in calls[2]
    work = tmp_path / "out.work"
    for step in ("tokenizer", "tokenize", "merge"):
        script = work / "scripts" / f"{step}.sbatch"
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
        assert "#SBATCH --partition=cpu" in script.read_text()
    assert "#SBATCH --array=0-1%1" in (work / "scripts" / "tokenize.sbatch").read_text()


def test_the_scripts_make_what_local_processes_make(recipe: Path, slurm: Path, tmp_path: Path) -> None:
    assert run("submit", "--recipe", recipe, "--elements", 2).exit_code == 0
    for step, elements in (("tokenizer", 1), ("tokenize", 2), ("merge", 1)):
        for element in range(elements):
            script = tmp_path / "out.work" / "scripts" / f"{step}.sbatch"
            subprocess.run(
                ["bash", str(script)],
                env={"SLURM_ARRAY_TASK_ID": str(element), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path.cwd())},
                check=True,
                capture_output=True,
            )
    assert not (tmp_path / "out.work").exists()
    local = prepared(tmp_path / "local", [tmp_path / "text.jsonl"], task_bytes=8000)
    ours, theirs = (json.loads((folder / "manifest.json").read_text()) for folder in (tmp_path / "out", local))
    assert ours["files"] == theirs["files"]


def test_a_refused_job_takes_the_accepted_ones_back(recipe: Path, slurm: Path, tmp_path: Path) -> None:
    (tmp_path / "refuse-1").touch()
    done = run("submit", "--recipe", recipe)
    assert done.exit_code != 0
    assert "invalid partition" in str(done.exception) + done.output
    assert slurm.read_text().splitlines()[-1] == "scancel 101"


def test_without_slurm_it_says_so(recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = run("submit", "--recipe", recipe)
    assert done.exit_code != 0 and "sbatch: not found" in str(done.exception) + done.output
    dry = run("submit", "--recipe", recipe, "--dry-run")
    assert dry.exit_code == 0 and dry.output.count("#!/bin/bash") == 3
    assert sys.executable in dry.output
