"""The studies that ship with the package, and where they lie."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from cola_megatron.config import ConfigError


def study_file(source: str) -> Path:
    """A YAML file, or the name of a study that ships with the package; raises ConfigError."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    folder = resources.files("launchers") / "sweeps"
    names = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    if source not in names:
        raise ConfigError(f"{source}: neither a study file nor one of the studies {', '.join(names)}")
    return Path(str(folder / f"{source}.yaml"))
