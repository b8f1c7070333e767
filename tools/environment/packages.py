"""What goes into the environment, in which order, and what the machine must offer for it."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

from tools.environment.project import Options, Project, SetupError, fits, requirement_name
from tools.environment.virtual_environment import Environment

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

CONSTRAINTS_NAME = "constraints.txt"


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


def install(environment: Environment, project: Project, options: Options) -> None:
    """All packages in order. Raises SetupError where pip fails."""
    environment.log.write_text("", encoding="utf-8")
    torch_version = install_torch(environment, project)
    held = ("-c", str(write_constraints(environment, project, torch_version)))
    wanted = dependencies_to_resolve(project, options)
    with step(f"dependencies ({len(wanted)} packages and what they need)"):
        environment.pip("the dependencies", "install", *wanted, *held)
    with step(STREAMING):
        environment.pip(STREAMING, "install", "--no-deps", project.dependency(STREAMING), *held)
    if COMPILED_EXTRA in options.extras:
        with step(f"the {COMPILED_EXTRA} extra (compiles; may take long)"):
            environment.pip(f"the {COMPILED_EXTRA} extra", "install", *COMPILED_BUILD_NEEDS, *held)
            # Without isolation: these build against the torch that is installed, not a fresh copy.
            needs = ("--no-build-isolation", *project.extras[COMPILED_EXTRA])
            environment.pip(f"the {COMPILED_EXTRA} extra", "install", *needs, *held)
    with step("cola-megatron itself"):
        editable = ("--no-deps", "--no-build-isolation", "-e", str(project.root))
        environment.pip("cola-megatron itself", "install", *editable)


def install_torch(environment: Environment, project: Project) -> str:
    """Install the pinned torch unless one that fits is there; returns the version in place.

    Raises SetupError where pip fails or the disk is too full.
    """
    accepted = project.dependency("torch")
    present = environment.version("torch")
    if present is not None and fits(present, accepted):
        print(f"  torch {present} is there and fits {accepted}", flush=True)
        return present
    pin = project.pins()["torch"]
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


def check_disk(folder: Path, needed: int) -> None:
    """Raises SetupError where the file system of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SetupError(f"no disk space: {folder} has {free / GIB:.1f} GiB free, setup needs {needed / GIB:.0f} GiB")


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


def write_constraints(environment: Environment, project: Project, torch_version: str) -> Path:
    """The committed constraints with torch held to the installed build; returns the file's path."""
    held = project.pins() | {"torch": f"torch=={torch_version}"}
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
