"""A YAML file as a mapping."""

from pathlib import Path
from typing import Any

import yaml

from cola_megatron.config.errors import ConfigError


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
