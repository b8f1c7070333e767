"""YAML as this package reads it, in files and in overrides alike: as YAML 1.2 and people mean it.

PyYAML reads YAML 1.1, in which 010 is 8, 1:30 is 90, `no` is false, 1e3 is a text and a date is no text, and a key that
stands twice drops what it had first. Here digits are decimal, what has leading zeros is a text (a number where one is
asked for: 42 of 042), true and false are the only truth values, and a repeated key is refused.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, ScalarNode

from cola_megatron.config.errors import ConfigError

_PLAIN: tuple[tuple[str, str, str], ...] = (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", "-+0123456789"),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9_]*)(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN"),
)
"""Of scalars without quotes: what they are, their form, their first characters."""


class _Int(int):
    """A number that, as a text, is what was written: a name of 1_000 stays that."""

    text: str

    def __str__(self) -> str:
        return self.text


class _Float(float):
    """The same: a name of 1e3 or 1.10."""

    text: str

    def __str__(self) -> str:
        return self.text


def _int(loader: yaml.SafeLoader, node: ScalarNode) -> int:
    number = _Int(node.value)
    number.text = node.value
    return number if str(int(number)) != node.value else int(number)


def _float(loader: yaml.SafeLoader, node: ScalarNode) -> float:
    number = _Float(loader.construct_yaml_float(node))
    number.text = node.value
    return number if str(float(number)) != node.value else float(number)


class _Loader(yaml.SafeLoader):
    """Scalars by `_PLAIN`; no key twice."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  PyYAML's own way

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue  # what it brings in may be said otherwise here
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if isinstance(key, str | int | float):
                if key in lines:
                    raise ConfigError(f"{key} stands twice, in lines {lines[key]} and {line}: join the two")
                lines[key] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read as a text, and what YAML 1.1 would not."""


_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)
_MERGE = "tag:yaml.org,2002:merge"
_Loader.add_implicit_resolver(_MERGE, re.compile(r"^<<$"), ["<"])
for _name, _form, _first in _PLAIN:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_form), list(_first))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^$"), [""])


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, nothing checked; raises ConfigError where it is not one, or has a key twice."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give a YAML file or a preset") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file (UTF-8); give a YAML file or a preset") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: a number too long
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: the top level must be a mapping of keys, not {type(tree).__name__}")
    return tree


def read_value(text: str) -> Any:
    """What a value is in a file; the text itself where it would be none. Raises ConfigError for a repeated key."""
    try:
        return yaml.load(text, _Loader) if text else None
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError):
        return text


def write_yaml(tree: dict[str, Any]) -> str:
    """The tree as YAML, in its order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)
