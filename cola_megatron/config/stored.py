"""Configs that are kept with what they made: written with the number of their schema, read whatever it is.

Checkpoints (`state.json`), run folders and imports (`config.yaml`) and submissions hold such trees. All of them are
read here, so that a key that was added, renamed or removed since is known wherever an old run is opened.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cola_megatron.config.changes import SCHEMA_KEY, schema_after, upgraded, without_left_over
from cola_megatron.config.errors import ConfigError
from cola_megatron.config.families import kinds_of
from cola_megatron.config.resolve import Config, resolve_tree
from cola_megatron.config.run import RunConfig
from cola_megatron.config.walk import annotations_of
from cola_megatron.config.yaml_files import read_yaml, write_yaml


def stored_tree(config: BaseModel) -> dict[str, Any]:
    """What is kept of a config, as values of JSON: every key, and before them the number of the schema."""
    history = getattr(config, "history", None)
    number = {} if history is None else {SCHEMA_KEY: schema_after(history)}
    return {**number, **config.model_dump(mode="json")}


def dump_config(config: BaseModel) -> str:
    """The same as YAML, in the order of the definitions."""
    return write_yaml(stored_tree(config))


def upgraded_tree(tree: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """The plain tree that a `stored_tree` of any schema would be today, without its number.

    A removed key whose value this version does not reproduce is still in it.

    Args:
        source: what the tree was read from, for messages.

    Raises:
        ConfigError: a newer version wrote it.
    """
    return upgraded(tree, RunConfig.history, source)


def stored_config(tree: dict[str, Any], source: str | Path) -> RunConfig:
    """The config in a `stored_tree` of any schema, to read what the run made.

    Not to run it again: removed keys that this version does not reproduce are left out, except those of `model`. What
    trained the weights is past; `load_config` and a resume refuse such a tree.

    Args, Raises: as `upgraded_tree`. ConfigError also where this version has no such model.
    """
    # A removed name that another key has since is not left over.
    current = without_left_over(
        upgraded_tree(tree, source),
        RunConfig.history,
        keep=lambda key: key.startswith("model.") or any(annotations_of(kind, key) for kind in kinds_of(RunConfig)),
    )
    try:
        return resolve_tree(RunConfig, current)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def tree_of_file(kind: type[Config], path: Path) -> dict[str, Any]:
    """The tree in a YAML file that somebody wrote or that was stored, upgraded to the present; defaults not filled in.

    A file with a number is of that schema. One without is of the present, as people write them, unless it is of the
    time before the number: then this package wrote it and it has every key, which no present file without a number
    needs to have. (A file that has them all means the same either way.)

    Raises:
        ConfigError: no such file, not a mapping, or written by a newer version.
    """
    tree, history = read_yaml(path), getattr(kind, "history", None)
    if history is None:
        return tree
    if SCHEMA_KEY in tree:
        return upgraded(tree, history, path)
    try:
        old = upgraded(tree, history, path)
        is_whole = _keys(resolve_tree(kind, old).model_dump(mode="json")) <= _keys(old)
    except ConfigError:
        return tree
    return old if is_whole else tree


def _keys(tree: dict[str, Any], prefix: str = "") -> set[str]:
    found = set()
    for name, value in tree.items():
        found |= _keys(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}"}
    return found
