"""What goes into the environment, in which order, and what the machine must offer for it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from tools.environment.project import Options, Project, SetupError, fits, requirement_name
from tools.environment.virtual_environment import Environment

# An extra whose one package compiles against the installed torch, and what its build script imports.
COMPILED_EXTRA, COMPILED_PACKAGE = "gpu", "flash-attn"
COMPILED_BUILD_NEEDS = ("ninja", "packaging", "setuptools", "wheel")

GIB = 2**30
# Free space asked for before downloading torch: the environment with every extra measured 2.0 GB with the CPU build,
# and a CUDA build with its libraries is about 8 GB; both with room for pip's temporary files.
NEEDED_WITH_CPU_TORCH = 3 * GIB
NEEDED_WITH_CUDA_TORCH = 14 * GIB


@dataclass(frozen=True)
class Torch:
    """The torch that the environment will hold."""

    requirement: str
    is_present: bool
    is_cuda: bool


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


def choose_torch(environment: Environment, project: Project) -> Torch:
    """The torch that is there, if it fits, else the pinned one. Installs nothing.

    Raises SetupError where pip does not find the pinned one or the disk is too full for it.
    """
    accepted = project.dependency("torch")
    present = environment.version("torch")
    if present is not None and fits(present, accepted):
        print(f"  torch {present} is there and fits {accepted}", flush=True)
        return Torch(f"torch=={present}", is_present=True, is_cuda="+cpu" not in present)
    pin = project.pins()["torch"]
    is_cuda = resolves_to_cuda(environment, pin)
    check_disk(environment.path, NEEDED_WITH_CUDA_TORCH if is_cuda else NEEDED_WITH_CPU_TORCH)
    if is_cuda and not has_nvidia_driver():
        print(
            "  note: no NVIDIA GPU was found, but pip resolves torch to a CUDA build of several GB; for a CPU build "
            "see docs/install.md",
            flush=True,
        )
    return Torch(pin, is_present=False, is_cuda=is_cuda)


def check_compiled_extra(environment: Environment, options: Options, torch: Torch) -> None:
    """Raises SetupError where the extra that compiles was asked for and cannot be built. Changes nothing."""
    if COMPILED_EXTRA not in options.extras or environment.version(COMPILED_PACKAGE) is not None:
        return
    cure = f"or leave {COMPILED_EXTRA} out of EXTRAS"
    if not has_nvcc():
        raise SetupError(
            f"the {COMPILED_EXTRA} extra compiles FlashAttention, and there is no nvcc (PATH, CUDA_HOME, "
            f"/usr/local/cuda): install the CUDA toolkit of torch's CUDA version, {cure}"
        )
    if not torch.is_cuda:
        raise SetupError(
            f"the {COMPILED_EXTRA} extra compiles FlashAttention against a CUDA build of torch, and "
            f"{torch.requirement} is a CPU build here: set up where pip finds the CUDA build, {cure}"
        )


def install(environment: Environment, project: Project, options: Options, torch: Torch) -> None:
    """All packages in order. Raises SetupError where pip fails."""
    # Every call is held to one torch: whoever asks for it loosely would get the newest CUDA build.
    constraints = environment.path / "constraints.txt"
    pins = project.pins() | {"torch": torch.requirement}
    constraints.write_text("\n".join(pins.values()) + "\n", encoding="utf-8")
    held = ("-c", str(constraints))

    wanted = dependencies_to_resolve(project, options, torch)
    with step(f"dependencies ({len(wanted)} packages and what they need)"):
        environment.pip("the dependencies", "install", *wanted, *held)
    if COMPILED_EXTRA in options.extras:
        with step(f"the {COMPILED_EXTRA} extra (compiles; may take long)"):
            environment.pip(f"the {COMPILED_EXTRA} extra", "install", *COMPILED_BUILD_NEEDS, *held)
            # Without isolation: these build against the torch that is installed, not a fresh copy.
            needs = ("--no-build-isolation", *project.extras[COMPILED_EXTRA])
            environment.pip(f"the {COMPILED_EXTRA} extra", "install", *needs, *held)
    ours = (*project.without_dependencies, "-e", str(project.root))
    with step(f"{' '.join(map(requirement_name, project.without_dependencies))} and cola-megatron"):
        environment.pip("cola-megatron itself", "install", "--no-deps", "--no-build-isolation", *ours)


def dependencies_to_resolve(project: Project, options: Options, torch: Torch) -> list[str]:
    """What one pip call resolves: base, extras and the build backend.

    A torch that is there is not asked for again: a vendor's build, such as 2.11.0a0+nv, counts as older than 2.11.
    """
    wanted = list(project.dependencies)
    if torch.is_present:
        wanted.remove(project.dependency("torch"))
    for extra in options.extras:
        if extra != COMPILED_EXTRA:
            wanted += project.extras[extra]
    return wanted + list(project.build_requires)


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


def has_nvidia_driver() -> bool:
    """Whether there seems to be a GPU; torch, which would know, is not installed yet."""
    return Path("/proc/driver/nvidia/gpus").is_dir() or shutil.which("nvidia-smi") is not None


def has_nvcc() -> bool:
    """Whether the CUDA compiler is where torch's build scripts look for it."""
    homes = filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"))
    return shutil.which("nvcc") is not None or any(Path(home, "bin", "nvcc").is_file() for home in homes)
