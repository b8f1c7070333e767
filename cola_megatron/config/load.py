"""From a preset or a YAML file and dotted overrides to a checked RunConfig."""

import difflib
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from cola_megatron.config.run import RunConfig
from cola_megatron.errors import ExitCode, UserError

Tree = TypeVar("Tree", bound=BaseModel)


class ConfigError(UserError, ValueError):
    """A config that cannot run; the message is one line with the key, the value and what would be right."""

    exit_code = ExitCode.WRONG_USE


def preset_names() -> list[str]:
    """Names of the presets that ship with the package, smallest model first."""
    shipped = {entry.name.removesuffix(".yaml") for entry in _presets().iterdir() if entry.name.endswith(".yaml")}
    order = ["tiny", "small", "base", "paper-2b"]
    return [name for name in order if name in shipped] + sorted(shipped - set(order))


def load_config(source: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Reads a preset (by name) or a YAML file (by path) and applies overrides such as `model.dit.block_size=16`.

    Raises:
        ConfigError: unknown source, key, type, or an impossible combination.
    """
    path, preset = Path(source), _presets() / f"{source}.yaml"
    if path.suffix not in (".yaml", ".yml") and not path.is_file():
        if not preset.is_file():
            raise ConfigError(f"{source}: neither a config file nor one of the presets {', '.join(preset_names())}")
        path = preset
    return resolve_tree(RunConfig, _overridden(RunConfig, read_yaml(path), overrides))


def load_tree(kind: type[Tree], path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Tree:
    """Another tree of sections from a YAML file, under the same rules; raises ConfigError."""
    return resolve_tree(kind, _overridden(kind, read_yaml(path), overrides))


def resolve_config(tree: dict[str, Any]) -> RunConfig:
    """Checks a plain tree and fills in the defaults; raises ConfigError."""
    return resolve_tree(RunConfig, tree)


def resolve_tree(kind: type[Tree], tree: dict[str, Any]) -> Tree:
    """The same for any tree of sections; raises ConfigError."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_one_line(kind, error)) from None


def dump_config(config: BaseModel) -> str:
    """The resolved tree as YAML, in the order of the definitions."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _presets():
    return resources.files("cola_megatron.config") / "presets"


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, nothing checked; raises ConfigError where it is not one."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give a YAML file or a preset") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file (UTF-8); give a YAML file or a preset") from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: a date that is none, a number too long
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: the top level must be a mapping of keys, not {type(tree).__name__}")
    return tree


def _overridden(kind: type[Tree], tree: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    for override in overrides:
        _apply(kind, tree, override)
    return tree


def _apply(kind: type[Tree], tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    *sections, last = parts = key.split(".")
    if not separator or not all(parts):
        raise ConfigError(f"{override}: an override has the form section.key=value")
    try:
        value = yaml.safe_load(text) if text else None
    except (yaml.YAMLError, ValueError):
        value = text
    if not _takes_text(kind, parts):
        value = _number(value)
    elif value is not None and not isinstance(value, str | list | dict):
        value = text  # name=007 is not name=7
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{key}: {section} is a value, not a section")
    tree[last] = value


def _takes_text(kind: type[Tree], parts: list[str]) -> bool:
    section: Any = kind
    for part in parts:
        fields = getattr(section, "model_fields", {})
        if part not in fields:
            return False
        section = fields[part].annotation
    return section in (str, str | None, Path, Path | None)


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` (no dot) as text; people mean a number."""
    if isinstance(value, str):
        try:
            return float(value) if value[:1].isdigit() or value[:1] in "+-." else value
        except ValueError:
            return value
    return value


def _one_line(kind: type[Tree], error: ValidationError) -> str:
    problems = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            problems.append(f"{key}={problem['input']!r}: unknown key{_suggestion(kind, problem['loc'])}")
        elif problem["type"] == "value_error":
            # Ours: it names keys relative to its own section.
            problems.append(f"{key}.{problem['ctx']['error']}" if key else str(problem["ctx"]["error"]))
        else:
            hint = "; quote it" if problem["type"] in ("string_type", "path_type") else ""
            problems.append(f"{key}={problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}{hint}")
    return "; ".join(problems)


def _suggestion(kind: type[Tree], location: tuple) -> str:
    section: Any = kind
    for part in location[:-1]:
        # Through lists and optional sections to the one section that their type names.
        annotation = section if isinstance(part, int) else section.model_fields[part].annotation
        section = next((each for each in (annotation, *get_args(annotation)) if hasattr(each, "model_fields")), None)
        if section is None:
            return ""
    near = difflib.get_close_matches(str(location[-1]), section.model_fields, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(section.model_fields)}"
