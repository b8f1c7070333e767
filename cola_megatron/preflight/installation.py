"""Versions, and the accelerators that are there or not."""

import platform
import sys
from importlib import metadata
from importlib.util import find_spec

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cola_megatron.preflight.check import Check, Status

PACKAGE = "cola-megatron"
CORE = ("torch", "deepspeed", "megatron-core", "numpy", "mosaicml-streaming")
# Not among the requirements of our metadata: pyproject.toml says why, in [dependency-groups].
INSTALLED_ALONE = ("mosaicml-streaming==0.13.0",)
# Package, a module that only the real one has, what it does here.
ACCELERATORS = (
    ("flash-attn", "flash_attn", "flash_attn.flash_attn_interface", "attention inside documents, and of prompts"),
    ("NVIDIA apex", "apex", "apex.optimizers", "weight gradients go straight into their sums under ZeRO 1"),
    ("transformer-engine", "transformer_engine", "transformer_engine.pytorch", "the models here do not use it"),
)


def installation_checks() -> list[Check]:
    """Python and the packages that decide the numbers, against the ranges of our own metadata; nothing is imported."""
    return [_python(), *map(_package, CORE), *map(_accelerator, ACCELERATORS)]


def versions() -> dict[str, str]:
    """What must be the same on every node of a job."""
    return {"python": platform.python_version(), **{name: _version(name) or "absent" for name in (PACKAGE, *CORE)}}


def _python() -> Check:
    wanted, found = metadata.metadata(PACKAGE)["Requires-Python"], platform.python_version()
    if found in SpecifierSet(wanted):
        return Check("python", Status.OK, found)
    return Check("python", Status.FAILED, found, f"use a Python {wanted}: {sys.executable} is none")


def _package(name: str) -> Check:
    needs = map(Requirement, (*(metadata.requires(PACKAGE) or []), *INSTALLED_ALONE))
    wanted = next((need for need in needs if need.name == name and not need.marker), None)
    found = _version(name)
    if found is None:
        return Check(name, Status.FAILED, "not installed", "`make setup` installs what is needed (docs/install.md)")
    # A build for CUDA calls itself 2.13.0+cu130.
    if wanted is not None and not wanted.specifier.contains(found.split("+")[0], prereleases=True):
        return Check(name, Status.FAILED, found, f"needs {wanted.specifier}; `make setup` installs a version that fits")
    return Check(name, Status.OK, found)


def _accelerator(known: tuple[str, str, str, str]) -> Check:
    name, top, real, use = known
    if find_spec(top) is None:
        return Check(name, Status.NOTE, "absent", "optional: docs/install.md says how to build it")
    try:
        there = find_spec(real) is not None
    except (ImportError, OSError) as error:  # a library that it was built against is missing
        return Check(name, Status.WARNING, f"not usable: {' '.join(str(error).split())}", "build it against this torch")
    if not there:
        cure = "that package is not NVIDIA's; `pip uninstall apex`" if top == "apex" else "install it again"
        return Check(name, Status.WARNING, f"installed, but it has no {real}", cure)
    if top == "apex":
        return _apex(name, use)
    return Check(name, Status.NOTE, f"{_version(top) or 'installed'}: {use}")


def _apex(name: str, use: str) -> Check:
    version, extension = _version("apex") or "installed", "fused_weight_gradient_mlp_cuda"
    if find_spec(extension) is None:
        cure = "training.fused_weight_gradients=auto stays off; build apex with its CUDA extensions (docs/install.md)"
        return Check(name, Status.WARNING, f"{version}, without {extension}", cure)
    return Check(name, Status.OK, f"{version}: {use} in bf16")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
