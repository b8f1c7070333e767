"""Kinds of changes of a tree of sections from one schema to the next, and the way of a stored tree to the present.

A schema is a number: 1 for a tree without a change, and one more for each. A change is a function from the plain tree
of the schema before it to that of its own; it changes the tree that it is given.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cola_megatron.config.errors import ConfigError

SCHEMA_KEY = "schema"
"""Of a stored tree, before all others: the number of its schema. Trees of schema 1 have none."""

Tree = dict[str, Any]
Change = Callable[[Tree], Tree]

_ABSENT = object()


@dataclass(frozen=True)
class Added:
    """A new key; trees from before it get the value that computes what they computed."""

    key: str
    value: Any
    where: tuple[str, Any] | None = None
    """(key, value) that a tree must hold to get it: for a key of one section of a tagged union."""

    def __call__(self, tree: Tree) -> Tree:
        if self.where is None or value_at(tree, self.where[0]) == self.where[1]:
            section, last = _section_of(tree, self.key)
            section.setdefault(last, copy.deepcopy(self.value))
        return tree


@dataclass(frozen=True)
class Renamed:
    """A key or a whole section under another name, wherever it stands."""

    old: str
    new: str

    def __call__(self, tree: Tree) -> Tree:
        value = take(tree, self.old)
        if value is not _ABSENT:
            section, last = _section_of(tree, self.new)
            section[last] = value
        return tree


@dataclass(frozen=True)
class Removed:
    """A key or a whole section that is gone.

    A value that is not among `reproduced` stays in the tree. Then a run does not resume: the key is named as one that
    differs. Weights of the checkpoint are read all the same unless the key is in `model`.
    """

    key: str
    why: str
    """For whoever still sets it: the reason, and what to do instead."""
    reproduced: tuple[Any, ...] | None
    """The values under which this version computes what the one before computed; None: whatever the value."""

    def __call__(self, tree: Tree) -> Tree:
        if self.reproduced is None or value_at(tree, self.key) in self.reproduced:
            take(tree, self.key)
        return tree


def schema_after(changes: Sequence[Change]) -> int:
    """The schema of a tree with all of these changes."""
    return 1 + len(changes)


def upgraded(tree: Tree, changes: Sequence[Change], source: str | Path) -> Tree:
    """A copy of a stored tree as if this version had stored it, without its number.

    Args:
        source: what the tree was read from, for messages.

    Raises:
        ConfigError: the number is none, or of a newer version.
    """
    tree, newest = copy.deepcopy(tree), schema_after(changes)
    schema = tree.pop(SCHEMA_KEY, 1)
    if type(schema) is not int or schema < 1:
        raise ConfigError(f"{source}: {SCHEMA_KEY}={schema!r} is not a number from 1 to {newest}")
    if schema > newest:
        raise ConfigError(
            f"{source} has a config of schema {schema}, and this version of cola_megatron reads schemas up to "
            f"{newest}: use the version that wrote it, or a newer one"
        )
    for change in changes[schema - 1 :]:
        tree = change(tree)
    return tree


def what_became_of(key: str, changes: Sequence[Change]) -> str | None:
    """What the changes did to a key that there is no more, such as "was renamed to b in schema 3"; None: nothing."""
    now, found = key, None
    for schema, change in enumerate(changes, start=2):
        if isinstance(change, Renamed) and _is_in(now, change.old):
            now = change.new + now.removeprefix(change.old)
            found = f"was renamed to {now} in schema {schema}"
        elif isinstance(change, Removed) and (_is_in(now, change.key) or _is_in(key, left_under(change, changes))):
            return f"was removed in schema {schema}: {change.why}"
    return found


def left_under(removed: Removed, changes: Sequence[Change]) -> str:
    """The key under which an upgraded tree has a value that a removal left in it: its section may have moved on."""
    key = removed.key
    for change in changes[changes.index(removed) :]:
        if isinstance(change, Renamed) and _is_in(key, change.old):
            key = change.new + key.removeprefix(change.old)
    return key


def without_left_over(tree: Tree, changes: Sequence[Change], keep: Callable[[str], bool]) -> Tree:
    """Takes out of an upgraded tree the values that removals left in it, but those of the keys to `keep`."""
    for change in changes:
        if isinstance(change, Removed) and not keep(left_under(change, changes)):
            take(tree, left_under(change, changes))
    return tree


def value_at(tree: Tree, key: str) -> Any:
    """The value of a dotted key; something equal to no value where there is none."""
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return _ABSENT
        tree = tree[part]
    return tree


def take(tree: Tree, key: str) -> Any:
    """Takes a dotted key out of a tree and returns its value, as `value_at`."""
    value = value_at(tree, key)
    if value is not _ABSENT:
        section, last = _section_of(tree, key)
        del section[last]
    return value


def _section_of(tree: Tree, key: str) -> tuple[Tree, str]:
    """The mapping that holds a key, made where it is missing, and the key's last part; raises ConfigError."""
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{key}: {section} is a value, not a section")
    return tree, last


def _is_in(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")
