"""From a plain tree to a checked one, and from pydantic's refusals to one line."""

import difflib
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cola_megatron.config.changes import what_became_of
from cola_megatron.config.errors import ConfigError
from cola_megatron.config.families import CONFIGS, families_that_know, kind_of
from cola_megatron.config.run import RunConfig
from cola_megatron.config.walk import annotations_of, place_of, sections_in, tags_of

Config = TypeVar("Config", bound=BaseModel)


def resolve_config(tree: dict[str, Any]) -> RunConfig:
    """Checks a plain tree and fills in the defaults; raises ConfigError."""
    return resolve_tree(RunConfig, tree)


def resolve_tree(kind: type[Config], tree: dict[str, Any]) -> Config:
    """The same for any tree of sections; raises ConfigError."""
    kind = kind_of(kind, tree)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_one_line(kind, problem) for problem in error.errors())) from None


def _one_line(kind: type[BaseModel], problem: ErrorDetails) -> str:
    key, section = place_of(kind, problem["loc"])
    match problem["type"]:
        case "extra_forbidden":
            fate = what_became_of(key, getattr(kind, "history", None) or ())
            if fate is None and issubclass(kind, RunConfig) and (others := families_that_know(key)):
                own = next(name for name, config in CONFIGS.items() if config is kind)
                return f"{key} is a key of model.family={', '.join(others)}, and this config has model.family={own}"
            known = section.model_fields if section is not None else ()
            return f"{key}={problem['input']!r}: unknown key; {fate or _suggestion(problem['loc'][-1], known)}"
        case "value_error":
            # Ours: it names keys relative to its own section.
            return f"{key}.{problem['ctx']['error']}" if key else str(problem["ctx"]["error"])
        case "union_tag_invalid" | "union_tag_not_found" as reason:
            members = [each for annotation in annotations_of(kind, key) for each in sections_in(annotation)]
            tag_key, tags = tags_of(members)
            if reason == "union_tag_not_found":
                return f"{key}.{tag_key} is missing; give one of {', '.join(tags)}"
            tag = problem["ctx"]["tag"]
            return f"{key}.{tag_key}={tag!r}: there is none of that name; {_suggestion(tag, tags)}"
        case reason:
            hint = "; quote it" if reason in ("string_type", "path_type") else ""
            return f"{key}={problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}{hint}"


def _suggestion(given: Any, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(given), list(known), n=1)
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
