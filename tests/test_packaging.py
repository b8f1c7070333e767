"""The packaging: what pyproject.toml, constraints.txt, the setup script, the Makefile and .ci/run promise each other.

The end-to-end tests run the real script with the real pip against a folder of tiny wheels made here, without network.
"""

from __future__ import annotations

import ast
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from cola_megatron.preflight import installation
from tools import setup_environment
from tools.environment import packages, project
from tools.environment.packages import Torch
from tools.environment.project import Options, SetupError, fingerprint, read_project
from tools.environment.virtual_environment import STAMP_NAME, Environment, reason

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, GROUPS = PYPROJECT["project"], PYPROJECT["dependency-groups"]
BASE = [Requirement(text) for text in PROJECT["dependencies"]]
EXTRAS = {
    extra: [Requirement(text) for text in requirements]
    for extra, requirements in PROJECT["optional-dependencies"].items()
}
WITHOUT_DEPENDENCIES = [Requirement(text) for text in GROUPS["without-dependencies"]]
# What mosaicml-streaming declares and we leave out: imports that cola_megatron.data makes harmless, and what it imports
# only for a path of that store. matplotlib it imports nowhere that we reach.
NOT_FOR_STREAMING = {
    *("torchvision", "transformers", "matplotlib", "google-cloud-storage", "paramiko", "oci"),
    *("azure-storage-blob", "azure-storage-file-datalake", "azure-identity"),
}


def pinned() -> dict[str, Version]:
    """Canonical name -> version of every line of constraints.txt, read with packaging rather than with the script."""
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
    requirements = [Requirement(line) for line in lines if line]
    versions = {}
    for requirement in requirements:
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", requirement
        assert canonicalize_name(requirement.name) not in versions, f"{requirement.name} is listed twice"
        versions[canonicalize_name(requirement.name)] = Version(specifier.version)
    return versions


# ---- metadata -------------------------------------------------------------------------------------------------------


def test_every_direct_dependency_is_pinned_inside_its_range():
    versions = pinned()
    build = [Requirement(text) for text in PYPROJECT["build-system"]["requires"]]
    for requirement in [*BASE, *WITHOUT_DEPENDENCIES, *build, *itertools.chain(*EXTRAS.values())]:
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_what_streaming_declares_is_a_base_dependency_of_ours_or_left_out_by_name():
    base = {canonicalize_name(requirement.name): pinned()[canonicalize_name(requirement.name)] for requirement in BASE}
    declared = [Requirement(text) for text in metadata.requires("mosaicml-streaming")]
    for requirement in (each for each in declared if each.marker is None or each.marker.evaluate({"extra": ""})):
        name = canonicalize_name(requirement.name)
        assert name in NOT_FOR_STREAMING or base[name] in requirement.specifier, requirement


def test_the_package_installed_alone_is_named_alike_wherever_a_user_meets_it():
    texts = tuple(str(requirement) for requirement in WITHOUT_DEPENDENCIES)
    assert texts == installation.INSTALLED_ALONE
    for file in ("cola_megatron/data/streaming_backend.py", "docs/install.md"):
        assert f"pip install --no-deps {' '.join(texts)}" in (ROOT / file).read_text(encoding="utf-8")


def test_the_package_named_apex_is_never_required():
    names = {requirement.name.lower() for group in [BASE, *EXTRAS.values()] for requirement in group} | pinned().keys()
    assert not {name for name in names if "apex" in name}


def test_supported_pythons_agree_everywhere():
    declared = SpecifierSet(PROJECT["requires-python"])
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for minor in range(8, 20):
        supported = (3, minor) in project.SUPPORTED_PYTHONS
        assert declared.contains(f"3.{minor}.1") == supported
        assert (f"(3, {minor})" in makefile) == supported


def test_the_setup_reads_the_same_names_and_pins_as_packaging_does():
    checkout = read_project(ROOT)
    assert [project.requirement_name(text) for text in checkout.dependencies] == [
        canonicalize_name(requirement.name) for requirement in BASE
    ]
    assert checkout.pins().keys() == pinned().keys()


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.11.0+cu130", True),
        ("2.11.0a0+vendor", True),
        ("2.13.0+cpu", True),
        ("2.13.1", True),
        ("2.14.0", False),
        ("2.14", False),
        ("2.10.1", False),
        ("3.0", False),
    ],
)
def test_a_present_torch_is_judged_by_its_release(version, expected):
    assert project.fits(version, read_project(ROOT).dependency("torch")) is expected


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [(3, 10, 13), (3, 13, 0), (2, 7, 18)])
def test_a_wrong_python_is_named_with_what_is_supported(version):
    with pytest.raises(SetupError) as error:
        project.check_python(version, "/somewhere/python")
    assert str(error.value) == (
        f"Python {'.'.join(map(str, version))} (/somewhere/python) is not supported: use Python 3.11 or 3.12"
    )


def test_an_older_python_can_parse_the_script_and_so_reaches_that_message():
    for path in project.SOURCES:
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 7))


def test_the_setup_imports_nothing_that_is_not_there_yet():
    for path in project.SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module]
            for module in modules:
                ours = ROOT / f"{module.replace('.', '/')}.py"
                assert ours in project.SOURCES or module.split(".")[0] in sys.stdlib_module_names, f"{path}: {module}"


def test_too_little_disk_space_is_one_line(tmp_path):
    with pytest.raises(SetupError, match=r"^no disk space: .* GiB free, setup needs 1073741824 GiB$"):
        packages.check_disk(tmp_path, 2**60)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "no disk space"),
        ("ERROR: Could not find a version\nERROR: No matching distribution found for a==1\n", "found for a==1"),
        ("ERROR: Cannot install a and b\nERROR: ResolutionImpossible: for help visit x", "Cannot install a and b"),
        ("No module named pip\n", "No module named pip"),
        ("", "no message"),
    ],
)
def test_the_reason_is_the_line_that_helps(output, expected):
    found = reason(output)
    assert expected in found
    assert "\n" not in found


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("data", encoding="utf-8")
    with pytest.raises(SetupError, match="is not a virtual environment"):
        Environment(tmp_path).create(system_site_packages=False)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_a_checkout_without_pyproject_is_named(tmp_path, capsys):
    assert setup_environment.main([], root=tmp_path) == 1
    assert "pyproject.toml is missing" in capsys.readouterr().err


def test_an_unknown_extra_is_a_wrong_use(capsys):
    with pytest.raises(SystemExit) as stop:
        setup_environment.main(["--extras", "dev,typo"])
    assert stop.value.code == 2
    assert "unknown extra typo: choose from dev, eval, gpu, prep, report" in capsys.readouterr().err


# ---- the stamp, without pip -----------------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path) -> Environment:
    """A real virtual environment without pip, which is made in a fraction of a second."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    return Environment(tmp_path / "venv")


def test_the_stamp_covers_its_extras_and_nothing_else(bare):
    assert not bare.is_current("digest", ())
    bare.finish("digest", ("dev", "report"))
    assert bare.is_current("digest", ("report",))
    assert not bare.is_current("digest", ("report", "prep"))
    assert not bare.is_current("another", ("report",))


def test_a_stamp_without_its_python_does_not_count(bare):
    bare.finish("digest", ())
    bare.python.unlink()
    assert not bare.is_current("digest", ())


@pytest.mark.parametrize(
    ("nvcc", "torch", "expected"),
    [
        (False, Torch("torch==2.13.0", is_present=False, is_cuda=True), "there is no nvcc (PATH, CUDA_HOME, "),
        (True, Torch("torch==2.13.0+cpu", is_present=True, is_cuda=False), "torch==2.13.0+cpu is a CPU build here"),
    ],
)
def test_an_extra_that_cannot_be_compiled_is_refused_by_name(bare, monkeypatch, nvcc, torch, expected):
    monkeypatch.setattr(packages, "has_nvcc", lambda: nvcc)
    packages.check_compiled_extra(bare, Options(bare.path, ("dev",)), torch)
    with pytest.raises(SetupError) as error:
        packages.check_compiled_extra(bare, Options(bare.path, ("gpu",)), torch)
    assert str(error.value).startswith("the gpu extra compiles FlashAttention")
    assert str(error.value).endswith("or leave gpu out of EXTRAS")
    assert expected in str(error.value)


def test_the_fingerprint_follows_each_input(tmp_path, monkeypatch):
    inputs = [ROOT / "pyproject.toml", ROOT / "constraints.txt", *project.SOURCES]
    copies = [Path(shutil.copy(path, tmp_path)) for path in inputs]
    assert len(set(copies)) == len(inputs)
    monkeypatch.setattr(project, "SOURCES", copies[2:])
    options = Options(tmp_path / "venv")
    seen = {fingerprint(read_project(tmp_path), options)}
    seen.add(fingerprint(read_project(tmp_path), Options(tmp_path / "venv", system_site_packages=True)))
    for path in copies:
        with path.open("a", encoding="utf-8") as file:
            file.write("# changed\n")
        seen.add(fingerprint(read_project(tmp_path), options))
    assert len(seen) == 2 + len(inputs)


# ---- the whole script, with the real pip ----------------------------------------------------------------------------


def write_wheel(folder: Path, name: str, version: str, requires: tuple[str, ...] = ()) -> str:
    """Write an installable wheel that holds metadata only; returns its file name."""
    stem = f"{name.replace('-', '_')}-{version}"
    needs = "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{stem}.dist-info/{file},,\n" for file in [*files, "RECORD"])
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for file, text in (files | {"RECORD": record}).items():
            wheel.writestr(f"{stem}.dist-info/{file}", text)
    return f"{stem}-py3-none-any.whl"


BACKEND = """
import shutil

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    return shutil.copy("{wheel}", wheel_directory).rsplit("/", 1)[-1]
"""


@dataclass
class TinyCheckout:
    """A project with the shape of ours, and an index folder with wheels for all it asks for."""

    root: Path
    index: Path
    venv: Path = field(init=False)

    def __post_init__(self) -> None:
        self.venv = self.root / ".venv"

    def write(self, constraints: str) -> None:
        """Write constraints.txt."""
        (self.root / "constraints.txt").write_text(constraints, encoding="utf-8")

    def installed(self) -> dict[str, str]:
        """Name -> version of what the environment holds besides pip."""
        command = [str(self.venv / "bin" / "python"), "-P", "-m", "pip", "list", "--format", "freeze"]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return dict(line.split("==") for line in listing.split() if not line.startswith(("pip=", "setuptools=")))

    def set_up(self, *arguments: str) -> int:
        """Run the script's command; returns its exit code."""
        return setup_environment.main(["--venv", str(self.venv), *arguments], root=self.root)


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> TinyCheckout:
    """The checkout, with pip cut off from every other index and from this machine's configuration."""
    checkout = TinyCheckout(tmp_path / "checkout", tmp_path / "index")
    checkout.root.mkdir()
    checkout.index.mkdir()
    for torch in ("2.11.0a0+vendor", "2.13.0+cpu", "2.13.9"):
        write_wheel(checkout.index, "torch", torch)
    write_wheel(checkout.index, "asks-for-torch", "1.0", ("torch",))
    write_wheel(checkout.index, "pytest", "1.0")
    write_wheel(checkout.index, "flash-attn", "2.8", ("torch",))
    write_wheel(checkout.index, "needs-too-much", "0.13.0", ("torchvision", "oci"))
    wheel = write_wheel(checkout.root, "tiny-project", "0.1.0")
    (checkout.root / "backend.py").write_text(BACKEND.format(wheel=wheel), encoding="utf-8")
    (checkout.root / "pyproject.toml").write_text(
        "[build-system]\n"
        'requires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        "[project]\n"
        'name = "tiny-project"\nversion = "0.1.0"\n'
        'dependencies = ["torch>=2.11,<2.14", "asks-for-torch"]\n'
        "[project.optional-dependencies]\n"
        'dev = ["pytest"]\nreport = []\ngpu = ["flash-attn"]\n'
        "[dependency-groups]\n"
        'without-dependencies = ["needs-too-much==0.13.0"]\n',
        encoding="utf-8",
    )
    checkout.write("torch==2.13.0\nasks-for-torch==1.0  # a remark\n")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(checkout.index))
    return checkout


def test_setup_installs_once_then_follows_changes_and_leaves_no_stamp_after_a_failure(tiny, capsys):
    assert tiny.set_up("--extras", "report") == 0
    expected = {
        "torch": "2.13.0+cpu",
        "asks-for-torch": "1.0",
        "needs-too-much": "0.13.0",
        "tiny-project": "0.1.0",
    }
    assert tiny.installed() == expected
    assert "is there and fits" not in capsys.readouterr().out

    start = time.monotonic()
    assert tiny.set_up("--extras", "report") == 0
    assert time.monotonic() - start < 0.5
    assert capsys.readouterr().out == ""

    # An extra that cannot be built here: refused by name before anything changes.
    assert tiny.set_up("--extras", "gpu") == 1
    assert "setup failed: the gpu extra compiles FlashAttention" in capsys.readouterr().err
    assert tiny.installed() == expected
    assert tiny.set_up("--extras", "report") == 0
    assert capsys.readouterr().out == ""

    # A pin that cannot be had: one line that names the step and the package, and no stamp.
    tiny.write("torch==2.13.0\nasks-for-torch==2.0\n")
    assert tiny.set_up("--extras", "report") == 1
    error = capsys.readouterr().err
    assert error.startswith("setup failed: pip failed at the dependencies: ERROR: ")
    assert "asks-for-torch" in error
    assert error.count("\n") == 1
    assert not (tiny.venv / STAMP_NAME).exists()

    # Mended, with one more extra; the torch that is there stays.
    tiny.write("torch==2.13.9\nasks-for-torch==1.0\n")
    assert tiny.set_up("--extras", "dev,report") == 0
    assert "torch 2.13.0+cpu is there and fits" in capsys.readouterr().out
    assert tiny.installed() == expected | {"pytest": "1.0"}

    # What was asked for once is kept by whoever asks for less.
    assert tiny.set_up("--extras", "report") == 0
    assert capsys.readouterr().out == ""


def test_setup_resumes_a_cut_off_one_and_keeps_a_fitting_torch(tiny, capsys):
    # What an interrupted creation leaves: an environment without pip.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tiny.venv)], check=True)
    tiny.write("torch==2.12.0\n")
    assert tiny.set_up() == 1
    assert capsys.readouterr().err.startswith(
        "setup failed: pip failed at torch: ERROR: No matching distribution found for torch==2.12.0"
    )

    environment = Environment(tiny.venv)
    assert packages.resolves_to_cuda(environment, "torch==2.13.9")
    assert not packages.resolves_to_cuda(environment, "torch==2.13.0")
    environment.pip("the test", "install", "torch==2.11.0a0+vendor")
    assert tiny.set_up() == 0
    assert tiny.installed()["torch"] == "2.11.0a0+vendor"

    assert tiny.set_up("--system-site-packages") == 1
    assert "was made without --system-site-packages" in capsys.readouterr().err


# ---- Makefile and .ci/run -------------------------------------------------------------------------------------------


def make(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Run make in the repository without the flags of a make that runs these tests."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    for name in ("PYTHON", "VENV", "EXTRAS", "SETUP_FLAGS", "PYTEST_FLAGS", "JOBS"):
        inherited.pop(name, None)
    command = ["make", "--no-print-directory", *arguments, *(f"{name}={value}" for name, value in variables.items())]
    return subprocess.run(command, cwd=ROOT, env=inherited, capture_output=True, text=True, check=False)


def test_make_alone_lists_every_target():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    listed = re.findall(r"^  make (\S+) +\S", make().stdout, re.MULTILINE)
    assert sorted(listed) == sorted(phony.split())


def test_ci_runs_the_target_that_sets_up_and_leaves_the_slow_tests_out():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert lines[-2:] == ["make lint", "exec make test"], "pytest's closing line is the last output"
    commands = make("-n", "test").stdout
    assert commands.index("-m tools.setup_environment") < commands.index(".venv/bin/python -m pytest")
    assert "slow" not in commands
    checks = re.findall(r"\.venv/bin/python -m (ruff check|ruff format --check|mypy)", make("-n", "lint").stdout)
    assert checks == ["ruff check", "ruff format --check", "mypy"]
    assert '-m pytest -m "slow or not slow"' in make("-n", "test-all").stdout
    assert "cola quickstart" in make("-n", "quickstart").stdout


def test_the_slow_marker_is_deselected_by_default(pytestconfig):
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    assert options["addopts"][-2:] == ["-m", "not slow"]
    assert any(line.startswith("slow:") for line in pytestconfig.getini("markers"))


def test_make_names_the_pythons_it_tried():
    failed = make("setup", PYTHON="/nowhere/python")
    assert failed.returncode != 0
    assert "error: no Python 3.11 or 3.12 among: /nowhere/python (does not run)" in failed.stderr
