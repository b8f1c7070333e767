"""What a checkout asks for: its dependencies and pins, how versions compare to them, and a hash of all that decides."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

SUPPORTED_PYTHONS = ((3, 11), (3, 12))

HERE = Path(__file__).resolve().parent
# The setup itself: what one version of it installed, another need not.
SOURCES = (HERE.parent / "setup_environment.py", *sorted(HERE.glob("*.py")))


class SetupError(Exception):
    """A setup that cannot go on; the message is one line for the user."""


@dataclass(frozen=True)
class Options:
    """What the user chose."""

    venv: Path
    extras: tuple[str, ...] = ()
    system_site_packages: bool = False


@dataclass(frozen=True)
class Project:
    """What setting up needs to know of a checkout."""

    root: Path
    dependencies: tuple[str, ...]
    extras: dict[str, tuple[str, ...]]
    build_requires: tuple[str, ...]
    without_dependencies: tuple[str, ...]

    @property
    def constraints(self) -> Path:
        """The file of the tested versions, as committed."""
        return self.root / "constraints.txt"

    def pins(self) -> dict[str, str]:
        """Normalised name -> line of the tested versions, remarks dropped."""
        lines = self.constraints.read_text(encoding="utf-8").splitlines()
        requirements = (line.split("#", 1)[0].strip() for line in lines)
        return {requirement_name(line): line for line in requirements if line}

    def dependency(self, name: str) -> str:
        """The base requirement of that normalised name. Raises KeyError where none has it."""
        return {requirement_name(requirement): requirement for requirement in self.dependencies}[name]


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
        without_dependencies=tuple(table["dependency-groups"]["without-dependencies"]),
    )


def requirement_name(requirement: str) -> str:
    """The normalised project name in front of a requirement's extras, versions and markers."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
    if name is None:
        raise ValueError(f"not a requirement: {requirement!r}")
    return re.sub(r"[-_.]+", "-", name.group()).lower()


def fits(version: str, requirement: str) -> bool:
    """Whether a version lies in a requirement of the form name>=A,<B, by release numbers alone.

    Vendors' builds such as 2.11.0a0+nv count as their release: they are what the machine's owner chose.
    Raises ValueError for another form.
    """
    bounds, release_of = re.search(r">=([\d.]+),<([\d.]+)$", requirement), re.match(r"[\d.]*\d", version)
    if bounds is None or release_of is None:
        raise ValueError(f"cannot compare {version!r} with {requirement!r}")
    (low, high), release = bounds.groups(), release_of.group()
    numbers = [tuple(map(int, text.split("."))) for text in (low, release, high)]
    return numbers[0] <= numbers[1] < numbers[2]


def fingerprint(project: Project, options: Options) -> str:
    """A hash of all that decides what the environment holds, but for the extras, which the stamp lists."""
    digest = hashlib.sha256()
    for path in (project.root / "pyproject.toml", project.constraints, *SOURCES):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    choice = [str(project.root), options.system_site_packages]
    digest.update(json.dumps(choice).encode())
    return digest.hexdigest()
