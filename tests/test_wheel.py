"""The wheel: one name in site-packages, everything inside it, and a `cola` that runs where no checkout is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("cola_megatron", "data_prep", "launchers", "slurm")
JUNK = ("__pycache__", ".ruff_cache")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, built with the backend that is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder))
    run(sys.executable, "-P", "-m", "pip", "wheel", *options, str(ROOT), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The Python of an environment that holds the wheel, sees our dependencies, and knows of no checkout."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    python = folder / "bin" / "python"
    options = ("--quiet", "--no-deps", "--no-index", "--no-compile")
    run(sys.executable, "-P", "-m", "pip", "--python", str(python), "install", *options, str(wheel), cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Python reads no .pth file in a folder that a .pth file names: our own editable install stays unseen.
    dependencies = [path for path in sys.path if path.endswith("-packages")]
    (packages / "dependencies.pth").write_text("\n".join(dependencies) + "\n", encoding="utf-8")
    return python


def run(*command: str, cwd: Path | None = None) -> str:
    """What a command prints, without the variables that show Python other packages; it must end with 0."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_every_file_under_one_name(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"cola_megatron"}
    expected = set()
    for folder in FOLDERS:
        inside = "" if folder == "cola_megatron" else "cola_megatron/programs/"
        files = (path for path in (ROOT / folder).rglob("*") if path.is_file() and not set(JUNK) & set(path.parts))
        expected |= {inside + path.relative_to(ROOT).as_posix() for path in files}
    assert names == expected
    assert "cola_megatron/programs/slurm/supervise.py" in names


def test_the_command_of_an_installed_wheel_finds_its_programs(installed, tmp_path):
    assert "doctor" in run(str(installed.parent / "cola"), "--help", cwd=tmp_path)
    assert "hidden_size" in run(str(installed), "-m", "cola_megatron", "config", "tiny", cwd=tmp_path)


def test_importing_the_command_makes_the_programs_importable(installed, tmp_path):
    code = (
        "import cola_megatron.command\n"
        "import cola_megatron, data_prep, launchers, slurm\n"
        "print(*(module.__file__ for module in (cola_megatron, data_prep, launchers, slurm)), sep='\\n')"
    )
    files = run(str(installed), "-c", code, cwd=tmp_path).split()
    assert len(files) == len(FOLDERS)
    assert all(Path(file).is_relative_to(installed.parents[1]) for file in files)


def test_nothing_in_the_wheel_imports_the_developers_tools():
    users = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.lstrip().startswith(("from tools", "import tools"))
    ]
    assert users == []


@pytest.mark.slow
def test_an_installed_wheel_works_through_child_processes_and_batch_scripts(installed, tmp_path):
    cola = str(installed.parent / "cola")
    assert "torch" in run(cola, "doctor", cwd=tmp_path)
    assert "hidden_size" in run(cola, "launch", "--nproc", "2", "--", "config", "tiny", cwd=tmp_path)

    options = ("data.path=/d", "training.micro_batch_size=4", "--dry-run")
    assert f"{installed} -m cola_megatron" in run(cola, "submit", "tiny", *options, cwd=tmp_path)

    for part in range(2):
        lines = [json.dumps({"text": f"Document {part}.{number}. " * 200}) for number in range(50)]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    options = ("--output", "packed", "--vocab-size", "264", "--workers", "2")
    run(cola, "prep", "run", "0.jsonl", "1.jsonl", *options, cwd=tmp_path)
    run(cola, "prep", "verify", "packed", cwd=tmp_path)
