"""From a preset or a YAML file and dotted overrides to a checked config."""

from pathlib import Path
from types import NoneType
from typing import Any

from pydantic import BaseModel

from cola_megatron.config.errors import ConfigError
from cola_megatron.config.families import kinds_of
from cola_megatron.config.resolve import Config, resolve_tree
from cola_megatron.config.run import RunConfig
from cola_megatron.config.stored import tree_of_file
from cola_megatron.config.walk import alternatives, annotations_of
from cola_megatron.config.yaml_files import read_value

_SIZES = ("tiny", "small", "base", "paper-2b")


def preset_names(family: str | None = None) -> list[str]:
    """Names of the presets that ship with the package: Cola DLM first, of a family the smallest first.

    Args:
        family: only those of `model.family`; None: all.
    """
    shipped = [entry.name.removesuffix(".yaml") for entry in _presets().iterdir() if entry.name.endswith(".yaml")]

    def family_and_size(name: str) -> tuple[str, int]:
        size = next((index for index, each in enumerate(_SIZES) if name.startswith(each)), len(_SIZES))
        return name.removeprefix(_SIZES[size]) if size < len(_SIZES) else name, size

    names = sorted(shipped, key=family_and_size)
    return [name for name in names if family is None or load_config(name).model.family == family]


def load_config(source: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Reads a preset (by name) or a YAML file (by path) and applies overrides such as `model.dit.block_size=16`.

    Raises:
        ConfigError: unknown source, key, type, or an impossible combination; or a newer version stored it.
    """
    path, preset = Path(source), _presets() / f"{source}.yaml"
    if path.suffix not in (".yaml", ".yml") and not path.is_file():
        if (path / "config.yaml").is_file():
            raise ConfigError(f"{source} is a folder: give {path / 'config.yaml'} in it")
        if not preset.is_file():
            raise ConfigError(f"{source}: neither a config file nor one of the presets {', '.join(preset_names())}")
        path = preset
    return load_tree(RunConfig, path, overrides)


def load_tree(kind: type[Config], path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Another tree of sections from a YAML file, under the same rules; raises ConfigError."""
    tree = tree_of_file(kind, path)
    for override in overrides:
        _apply(kind, tree, override)
    return resolve_tree(kind, tree)


def _presets() -> Path:
    return Path(__file__).parent / "presets"


def _apply(kind: type[BaseModel], tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    *sections, last = parts = key.split(".")
    if not separator or not all(parts):
        raise ConfigError(f"{override}: an override has the form section.key=value")
    try:
        value = read_value(text)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None
    if _takes_text(kind, key) and value is not None and not isinstance(value, str | list | dict):
        value = text  # name=007 is not name=7
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{key}: {section} is a value, not a section")
    tree[last] = value


def _takes_text(kind: type[BaseModel], key: str) -> bool:
    """Whether text belongs there; in a tagged union, or a run of any family, in any of its sections: what is no text in
    the one that was chosen is read out of the text.
    """
    return any(
        set(alternatives(each)) <= {str, Path, NoneType}
        for member in kinds_of(kind)
        for each in annotations_of(member, key)
    )
