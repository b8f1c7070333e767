"""Create or update the project's virtual environment from a bare Python 3.11 or 3.12, with pip alone.

    python3 -m tools.setup_environment --venv .venv --extras dev,report

Two things make a plain `pip install -e .` a bad start, and this script exists for them. A package that asks for
torch before we do brings the newest CUDA build, gigabytes that a machine without a GPU cannot use: so torch comes
first, and everything after it is held to that very build. And mosaicml-streaming declares torchvision,
transformers < 5 and four cloud SDKs that local training never calls: so it comes without its dependencies, plus the
few it really imports. docs/install.md is the same story for users.

A stamp in the environment holds a hash of all that decides its contents, and the extras it has. It is removed before
anything changes and written last, so a setup that failed or was interrupted is never taken for a finished one.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and not __package__:
    # Run as a file, Python puts this folder first on the path, where a neighbour named like a standard module
    # would be imported instead of it.
    sys.path.pop(0)

import argparse
import fcntl
import hashlib
import json
import operator
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

SUPPORTED_PYTHONS = ((3, 11), (3, 12))

STREAMING = "mosaicml-streaming"
# What `import streaming` itself imports (numpy, torch and tqdm, which it imports too, are base dependencies), then
# what it imports once a path is on S3 or HTTP. Of what it declares, torchvision and transformers are left out
# (cola_megatron.data makes their imports harmless), and so are the SDKs of the other clouds and SSH, which it imports
# only when a path of theirs is used.
STREAMING_NEEDS = (
    *("brotli", "catalogue", "filelock", "pillow", "python-snappy", "xxhash", "zstd"),
    *("boto3", "requests"),
)

# An extra whose packages compile against the installed torch, and what their build scripts import.
COMPILED_EXTRA = "gpu"
COMPILED_BUILD_NEEDS = ("ninja", "packaging", "wheel")

GIB = 2**30
# Free space asked for before downloading torch: the whole environment measured 1.3 GB with the CPU build, and a
# CUDA build with its libraries is about 8 GB; both with room for pip's temporary files.
NEEDED_WITH_CPU_TORCH = 3 * GIB
NEEDED_WITH_CUDA_TORCH = 14 * GIB

COMPARISONS = {">=": operator.ge, "<=": operator.le, "==": operator.eq, ">": operator.gt, "<": operator.lt}

STAMP_NAME = ".cola-setup"
LOG_NAME = "setup.log"
CONSTRAINTS_NAME = "constraints.txt"


class SetupError(Exception):
    """A setup that cannot go on; the message is one line for the user."""


@dataclass(frozen=True)
class Options:
    """What the user chose."""

    venv: Path
    extras: tuple[str, ...] = ("dev", "report")
    system_site_packages: bool = False


@dataclass(frozen=True)
class Project:
    """What setting up needs to know of a checkout."""

    root: Path
    dependencies: tuple[str, ...]
    extras: dict[str, tuple[str, ...]]
    build_requires: tuple[str, ...]

    @property
    def constraints(self) -> Path:
        """The tested versions, as committed."""
        return self.root / "constraints.txt"


# ---- what to install ------------------------------------------------------------------------------------------------


def check_python(version: tuple[int, ...], executable: str) -> None:
    """Raises SetupError where `version` of the interpreter `executable` is not a supported one."""
    if tuple(version[:2]) not in SUPPORTED_PYTHONS:
        found = ".".join(str(part) for part in version[:3])
        wanted = " or ".join(f"{major}.{minor}" for major, minor in SUPPORTED_PYTHONS)
        raise SetupError(f"Python {found} ({executable}) is not supported: use Python {wanted}")


def read_project(root: Path) -> Project:
    """The dependencies that pyproject.toml in `root` declares. Raises SetupError where there is none."""
    import tomllib  # not at the top: Python 3.10 lacks it and must reach check_python's message

    try:
        text = (root / "pyproject.toml").read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise SetupError(f"{error.filename} is missing: run this from a checkout of the project") from error
    table = tomllib.loads(text)
    extras = table["project"]["optional-dependencies"]
    return Project(
        root=root,
        dependencies=tuple(table["project"]["dependencies"]),
        extras={name: tuple(requirements) for name, requirements in extras.items()},
        build_requires=tuple(table["build-system"]["requires"]),
    )


def requirement_name(requirement: str) -> str:
    """The normalised project name in front of a requirement's extras, versions and markers."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
    if name is None:
        raise ValueError(f"not a requirement: {requirement!r}")
    return re.sub(r"[-_.]+", "-", name.group()).lower()


def pins(constraints: str) -> dict[str, str]:
    """Normalised name -> constraint line of a constraints file's text, remarks dropped."""
    lines = (line.split("#", 1)[0].strip() for line in constraints.splitlines())
    return {requirement_name(line): line for line in lines if line}


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, without trailing zeros: '2.13.0+cpu' -> (2, 13)."""
    numbers = re.match(r"\d+(\.\d+)*", version.strip())
    if numbers is None:
        raise ValueError(f"not a version: {version!r}")
    parts = [int(part) for part in numbers.group().split(".")]
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def fits(version: str, requirement: str) -> bool:
    """Whether a version lies in a requirement's bounds (>=, >, <, <=, ==), by release numbers alone.

    Vendors' builds such as 2.11.0a0+nv count as their release: they are what the machine's owner chose.
    Raises ValueError for another operator.
    """
    bounds = re.sub(r"^[A-Za-z0-9._-]+(\[.*?\])?", "", requirement.split(";")[0].strip())
    for bound in filter(None, (part.strip() for part in bounds.split(","))):
        sign = re.match(r">=|<=|==|>|<", bound)
        if sign is None:
            raise ValueError(f"cannot compare versions by {bound!r}")
        if not COMPARISONS[sign.group()](release(version), release(bound[sign.end() :])):
            return False
    return True


def named(requirements: tuple[str, ...], name: str) -> str:
    """The requirement of that name. Raises KeyError where none has it."""
    for requirement in requirements:
        if requirement_name(requirement) == name:
            return requirement
    raise KeyError(name)


def fingerprint(project: Project, options: Options) -> str:
    """A hash of all that decides what the environment holds, but for the extras, which the stamp lists."""
    digest = hashlib.sha256()
    for path in (project.root / "pyproject.toml", project.constraints, Path(__file__)):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    choice = [str(project.root), options.system_site_packages]
    digest.update(json.dumps(choice).encode())
    return digest.hexdigest()


# ---- the machine ----------------------------------------------------------------------------------------------------


def has_nvidia_gpu() -> bool:
    """Whether the driver lists a GPU; asks the driver, not torch, which is not installed yet."""
    driver = Path("/proc/driver/nvidia/gpus")
    if driver.is_dir() and any(driver.iterdir()):
        return True
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    try:
        listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and "GPU" in listing.stdout


def check_disk(folder: Path, needed: int) -> None:
    """Raises SetupError where the file system of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SetupError(f"no disk space: {folder} has {free / GIB:.1f} GiB free, setup needs {needed / GIB:.0f} GiB")


# ---- the virtual environment ----------------------------------------------------------------------------------------


class Environment:
    """A virtual environment on disk and the pip inside it."""

    def __init__(self, path: Path, verbose: bool = False) -> None:
        self.path = path
        self.python = path / "bin" / "python"
        self.log = path / LOG_NAME
        self.stamp = path / STAMP_NAME
        self.verbose = verbose

    def stamped(self) -> tuple[str, frozenset[str]]:
        """The fingerprint and the extras of the last finished setup; an empty fingerprint where there is none."""
        try:
            digest, *extras = self.stamp.read_text(encoding="utf-8").split()
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return "", frozenset()
        return digest, frozenset(extras)

    def is_current(self, digest: str, extras: tuple[str, ...]) -> bool:
        """Whether a finished setup with this fingerprint, and at least these extras, is in place."""
        stamped, present = self.stamped()
        return self.python.exists() and stamped == digest and present.issuperset(extras)

    def finish(self, digest: str, extras: tuple[str, ...]) -> None:
        """Write the stamp, whole or not at all."""
        draft = self.stamp.with_suffix(".tmp")
        draft.write_text("\n".join((digest, *extras)) + "\n", encoding="utf-8")
        draft.replace(self.stamp)

    def create(self, system_site_packages: bool) -> None:
        """Make the environment, or check that the present one can be used.

        Raises SetupError where the folder is something else, was made with the other choice of
        `system_site_packages`, holds an unsupported Python, or Python cannot make environments.
        """
        if self.path.exists() and not self.path.is_dir():
            raise SetupError(f"{self.path} is a file: remove it, or name another place with --venv")
        if self._has_pip():
            self._check(system_site_packages)
            return
        if self.path.is_dir() and any(self.path.iterdir()) and not self._settings():
            raise SetupError(f"{self.path} is not a virtual environment: remove it, or name another place with --venv")
        # --clear: whatever is here has no working pip, so an earlier try was cut off or its Python is gone.
        command = [sys.executable, "-m", "venv", "--clear", str(self.path)]
        made = subprocess.run(
            command + ["--system-site-packages"] * system_site_packages, capture_output=True, text=True, check=False
        )
        if made.returncode != 0:
            raise SetupError(f"cannot make {self.path} with {sys.executable}: {reason(made.stdout + made.stderr)}")

    def version(self, package: str) -> str | None:
        """The installed version of a package as the environment sees it, or None."""
        code = (
            "import importlib.metadata as m, sys\n"
            "try: print(m.version(sys.argv[1]))\n"
            "except m.PackageNotFoundError: pass"
        )
        # -P here and for pip: the working directory's own *.egg-info must not pass for something installed.
        answer = subprocess.run(
            [str(self.python), "-P", "-c", code, package], capture_output=True, text=True, check=True
        )
        return answer.stdout.strip() or None

    def pip(self, step: str, *arguments: str) -> str:
        """Run pip, its output going to the log (and the screen if verbose); returns it.

        Raises SetupError naming `step` and pip's own reason where pip fails.
        """
        command = [str(self.python), "-P", "-m", "pip", *arguments]
        output: list[str] = []
        pipes = {
            "env": os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"},
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
            "errors": "replace",
        }
        with self.log.open("a", encoding="utf-8") as log, subprocess.Popen(command, **pipes) as process:
            log.write(f"$ pip {' '.join(arguments)}\n")
            for line in process.stdout or ():
                output.append(line)
                log.write(line)
                if self.verbose:
                    print(line, end="", flush=True)
        if process.returncode != 0:
            raise SetupError(f"pip failed at {step}: {reason(''.join(output))} (all of it: {self.log})")
        return "".join(output)

    def _settings(self) -> dict[str, str]:
        """pyvenv.cfg's keys and values; empty where the folder is no virtual environment."""
        try:
            lines = (self.path / "pyvenv.cfg").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return {}
        return {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines)}

    def _has_pip(self) -> bool:
        if not self._settings() or not self.python.exists():
            return False
        probe = [str(self.python), "-c", "import pip"]
        try:
            return subprocess.run(probe, capture_output=True, check=False).returncode == 0
        except OSError:
            return False

    def _check(self, system_site_packages: bool) -> None:
        """Raises SetupError where the present environment is not what was asked for."""
        code = "import sys; print(*sys.version_info[:3])"
        answer = subprocess.run([str(self.python), "-c", code], capture_output=True, text=True, check=True)
        check_python(tuple(int(part) for part in answer.stdout.split()), str(self.python))
        sees_system = self._settings().get("include-system-site-packages") == "true"
        if sees_system != system_site_packages:
            made = "with" if sees_system else "without"
            raise SetupError(f"{self.path} was made {made} --system-site-packages: remove it, or choose as it was made")


def reason(output: str) -> str:
    """The one line of a failed command's output that says why."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if any("No space left on device" in line for line in lines):
        return "no disk space (No space left on device)"
    # pip's last ERROR line names the package, but for conflicts, where it names a page about them.
    errors = [line for line in lines if line.startswith(("ERROR:", "Error:")) and "ResolutionImpossible" not in line]
    return (errors or lines or ["no message"])[-1]


# ---- the steps ------------------------------------------------------------------------------------------------------


@contextmanager
def step(title: str) -> Iterator[None]:
    """Print a title before, and the seconds after, what runs inside."""
    print(f"  {title} ...", end=" ", flush=True)
    start = time.monotonic()
    try:
        yield
    except BaseException:
        print("failed", flush=True)
        raise
    print(f"{time.monotonic() - start:.0f} s", flush=True)


@contextmanager
def exclusive(project: Project) -> Iterator[None]:
    """Hold the checkout's setup lock: two commands that start at once must not install over each other."""
    # A file that is there anyway; opened for writing because NFS gives exclusive locks on no other.
    with project.constraints.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another setup of this checkout is running: waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            print(f"note: no lock on this file system ({error.strerror}): run one setup at a time", flush=True)
        yield  # closing the file releases the lock


def install_torch(environment: Environment, project: Project) -> str:
    """Install the pinned torch unless one that fits is there; returns the version in place.

    Raises SetupError where pip fails or the disk is too full.
    """
    accepted = named(project.dependencies, "torch")
    present = environment.version("torch")
    if present is not None and fits(present, accepted):
        print(f"  torch {present} is there and fits {accepted}", flush=True)
        return present
    pin = pins(project.constraints.read_text(encoding="utf-8"))["torch"]
    cuda = resolves_to_cuda(environment, pin)
    check_disk(environment.path, NEEDED_WITH_CUDA_TORCH if cuda else NEEDED_WITH_CPU_TORCH)
    if cuda and not has_nvidia_gpu():
        print(
            "  note: no NVIDIA GPU was found, but pip resolves torch to a CUDA build of several GB; for a CPU build "
            "see docs/install.md",
            flush=True,
        )
    with step(f"torch ({pin})"):
        environment.pip("torch", "install", pin)
    installed = environment.version("torch")
    if installed is None:
        raise SetupError(f"pip reported success but torch is not in {environment.path} (see {environment.log})")
    return installed


def resolves_to_cuda(environment: Environment, pin: str) -> bool:
    """Whether pip would take a torch that is not marked as a CPU build, asked without downloading it.

    Raises SetupError where pip finds no torch at all.
    """
    report = environment.path / "torch-report.json"
    environment.pip("torch", "install", "--dry-run", "--no-deps", "--report", str(report), pin)
    found = json.loads(report.read_text(encoding="utf-8"))["install"]
    report.unlink()
    files = [unquote(entry["download_info"]["url"]).rsplit("/", 1)[-1] for entry in found]
    # Outside Linux there are no CUDA builds that the file name would not announce.
    return platform.system() == "Linux" and not all("+cpu" in name for name in files)


def write_constraints(environment: Environment, project: Project, torch_version: str) -> Path:
    """The committed constraints with torch held to the installed build; returns the file's path."""
    held = pins(project.constraints.read_text(encoding="utf-8")) | {"torch": f"torch=={torch_version}"}
    path = environment.path / CONSTRAINTS_NAME
    path.write_text("\n".join(held.values()) + "\n", encoding="utf-8")
    return path


def dependencies_to_resolve(project: Project, options: Options) -> list[str]:
    """What one pip call resolves: base and extras without mosaicml-streaming, its needs, and the build backend."""
    wanted = [requirement for requirement in project.dependencies if requirement_name(requirement) != STREAMING]
    for extra in options.extras:
        if extra != COMPILED_EXTRA:
            wanted += project.extras[extra]
    return wanted + list(STREAMING_NEEDS) + list(project.build_requires)


def set_up(project: Project, options: Options, verbose: bool = False) -> bool:
    """Bring the environment up to date; returns False where it already was.

    Raises SetupError with one line for the user where a step fails. No stamp is left then.
    """
    environment = Environment(options.venv, verbose)
    digest = fingerprint(project, options)
    if environment.is_current(digest, options.extras):
        return False
    with exclusive(project):
        if environment.is_current(digest, options.extras):  # another command finished it while we waited
            return False
        # An extra that was asked for once stays: `make test` after `make setup EXTRAS=prep` must not undo it.
        kept = environment.stamped()[1] & project.extras.keys()
        options = replace(options, extras=tuple(sorted(kept.union(options.extras))))
        print(f"Setting up {options.venv} ({', '.join(('base', *options.extras))})", flush=True)
        try:
            with step("virtual environment"):
                environment.create(options.system_site_packages)
            environment.stamp.unlink(missing_ok=True)
            install(environment, project, options)
            environment.finish(digest, options.extras)
        except OSError as error:
            raise SetupError(f"cannot write {error.filename or options.venv}: {error.strerror}") from error
    return True


def install(environment: Environment, project: Project, options: Options) -> None:
    """All packages in order. Raises SetupError where pip fails."""
    environment.log.write_text("", encoding="utf-8")
    torch_version = install_torch(environment, project)
    held = ("-c", str(write_constraints(environment, project, torch_version)))
    wanted = dependencies_to_resolve(project, options)
    with step(f"dependencies ({len(wanted)} packages and what they need)"):
        environment.pip("the dependencies", "install", *wanted, *held)
    with step(STREAMING):
        environment.pip(STREAMING, "install", "--no-deps", named(project.dependencies, STREAMING), *held)
    if COMPILED_EXTRA in options.extras:
        with step(f"the {COMPILED_EXTRA} extra (compiles; may take long)"):
            environment.pip(f"the {COMPILED_EXTRA} extra", "install", *COMPILED_BUILD_NEEDS, *held)
            # Without isolation: these build against the torch that is installed, not a fresh copy.
            needs = ("--no-build-isolation", *project.extras[COMPILED_EXTRA])
            environment.pip(f"the {COMPILED_EXTRA} extra", "install", *needs, *held)
    with step("cola-megatron itself"):
        editable = ("--no-deps", "--no-build-isolation", "-e", str(project.root))
        environment.pip("cola-megatron itself", "install", *editable)


# ---- the command ----------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None, project: Project) -> tuple[Options, bool]:
    """The options and whether to be verbose; exits with 2 for a wrong use."""
    parser = argparse.ArgumentParser(
        prog="python3 -m tools.setup_environment",
        description="Create or update the project's virtual environment with pip.",
        epilog="example: python3 -m tools.setup_environment --extras dev,report,prep",
    )
    parser.add_argument("--venv", type=Path, default=Path(".venv"), help="where it lives (default: %(default)s)")
    parser.add_argument(
        "--extras",
        default="dev,report",
        help=f"comma-separated, of {', '.join(sorted(project.extras))} (default: %(default)s)",
    )
    parser.add_argument(
        "--system-site-packages",
        action="store_true",
        help="let the environment see this Python's own packages, to use a torch that is installed there",
    )
    parser.add_argument("--verbose", action="store_true", help="show pip's output (it goes to the log in any case)")
    given = parser.parse_args(arguments)
    extras = tuple(dict.fromkeys(filter(None, (name.strip() for name in given.extras.split(",")))))
    unknown = [name for name in extras if name not in project.extras]
    if unknown:
        parser.error(f"unknown extra {', '.join(unknown)}: choose from {', '.join(sorted(project.extras))}")
    return Options(given.venv.absolute(), extras, given.system_site_packages), given.verbose


def main(arguments: list[str] | None = None, root: Path | None = None) -> int:
    """The command: 0 done or nothing to do, 1 failed, 2 wrong use, 130 interrupted."""
    try:
        check_python(tuple(sys.version_info[:3]), sys.executable)
        project = read_project(root or Path(__file__).resolve().parents[1])
        options, verbose = parse(arguments, project)
        if set_up(project, options, verbose):
            print(f"Done: {options.venv / 'bin' / 'cola'}", flush=True)
    except SetupError as error:
        print(f"setup failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup interrupted: run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
