"""What a recipe file leaves unclear, refused before it is read: a key without a value, and a key given twice."""

from collections.abc import Iterator
from pathlib import Path

import yaml

from cola_megatron.config import ConfigError


def refuse_unclear_keys(path: Path, overrides: list[str]) -> None:
    """Looks at the file as it is written: read as values, `near:` is null and the last of two keys wins.

    Files that are no YAML are left to the reader.

    Raises:
        ConfigError: names the first unclear key with its line, or the override.
    """
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return
    for problem in _unclear(node, ""):
        raise ConfigError(f"{path}:{problem}")
    for override in overrides:
        _, given, value = override.partition("=")
        if given and not value:
            raise ConfigError(f"{override}: has no value; {_cure('the key', '=')}")


def _unclear(node: yaml.Node | None, prefix: str) -> Iterator[str]:
    if isinstance(node, yaml.SequenceNode):
        for number, each in enumerate(node.value):
            yield from _unclear(each, f"{prefix}{number}.")
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if name in seen:
            yield f"{line}: {name} stands in line {seen[name]} as well; leave one out"
        seen[name] = line
        if isinstance(value, yaml.ScalarNode) and value.value == "" and value.style is None:
            yield f"{line}: {name} has no value; {_cure(key.value, ': ')}"
        yield from _unclear(value, f"{name}.")


def _cure(key: str, separator: str) -> str:
    return f"write {key}{separator}{{}} for the published values of a section, {key}{separator}null to turn it off"
