"""What produced a run: package versions, git revision, command, host."""

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

_PACKAGES = ("cola-megatron", "torch", "deepspeed", "megatron-core", "mosaicml-streaming", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def provenance() -> dict[str, object]:
    """One start of a run, as manifest.json keeps it."""
    return {
        "command": sys.argv,
        "host": platform.node(),
        "git_revision": git("rev-parse", "HEAD"),
        "git_changes": git("status", "--porcelain"),
        "versions": versions(),
    }


def git(*arguments: str) -> str | None:
    """What git says of the checkout that this package lies in; None where there is none."""
    try:
        answer = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None  # installed from a wheel, or no git on this machine
    return answer.stdout.strip()
