"""Writes docs/configuration.md from the config tree: what the fields say of themselves, and nothing else.

python -m tools.config_reference           write the page
python -m tools.config_reference --check   exit code 1 where the page is not current
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cola_megatron.config import ColaConfig, ModelConfig, RunConfig, TrainingConfig, load_config, preset_names
from cola_megatron.config.facts import Origin, is_free, origin_of
from cola_megatron.config.families import CONFIGS
from cola_megatron.config.walk import sections_in, tags_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

HEAD = """\
# Configuration

<!-- Written by `python -m tools.config_reference`. Edit the fields in cola_megatron/config, not this page. -->

One typed tree holds every setting of a run. A config is a preset or a YAML file, then overrides:

```
cola config paper-2b                                       # the whole tree with every default filled in
cola config base model.dit.block_size=32 --json            # the same, for scripts
cola train base stage=1 name=first data.path=data/corpus   # what `cola config` prints is what trains
```

An override is `section.key=value`; the value is read as YAML, so `null`, `true`, `1e-4` and `[0.9, 0.95]` mean what
they say. An unknown key, a wrong type or a combination that cannot run is refused before anything starts, in one line
that names the key, the value and what would be right. The resolved tree is stored with every run (`config.yaml`) and in
every checkpoint.

**Origin** says where a default comes from. *published*: the paper (arXiv 2605.06548), its released package or its blog
states it. *ours*: not published, or about how this project runs. *tuned*: ours, and chosen by a measurement.

**Resume** says *free* where a run may go on from its checkpoint with another value: the key changes how a run is run
and not what it computes.

A stored tree begins with the number of its `schema`, and trees of every earlier schema are read: keys that were added,
renamed or removed since are brought up to date. A file of yours needs no number and then means what this page says. One
that begins with `schema: 1` means what it meant under that schema; one that has every key and no number was printed by
a version from before the numbers, and is of schema 1.

## Presets

{presets}

`paper-2b` is the published model and recipe. The files are in `cola_megatron/config/presets/`; a preset sets the keys
in its file, and the defaults below fill in the rest.
"""


class Part(NamedTuple):
    """A section of the page."""

    name: str
    """Dotted; empty for the top level."""
    kind: type[BaseModel]
    is_free: bool
    chosen_by: str | None = None
    """`key=value` that chooses it, where it is one of a tagged union."""


class Row(NamedTuple):
    """One key of the tree."""

    key: str
    values: str
    default: str
    origin: Origin
    is_free: bool
    meaning: str


ROOT = Part("", RunConfig, is_free=False)


def parts(part: Part = ROOT) -> Iterator[Part]:
    """A section and all sections below it, in the order of the definitions; of the root also what each family adds."""
    shared = list(_below(part))
    yield from shared
    if part.kind is RunConfig:
        known = {each[:2] for each in shared}
        for family, kind in CONFIGS.items():
            for own in _below(Part("", kind, is_free=False)):
                if own[:2] not in known and rows(own):
                    yield own._replace(chosen_by=own.chosen_by or f"model.family={family}")


def _below(part: Part) -> Iterator[Part]:
    yield part
    for name, field in part.kind.model_fields.items():
        members = sections_in(field.annotation)
        tag, chosen = tags_of(members) if len(members) > 1 else ("", {None: members[0]} if members else {})
        for value, kind in chosen.items():
            free, key = part.is_free or is_free(field), f"{part.name}.{name}".lstrip(".")
            yield from _below(Part(key, kind, free, value and f"{key}.{tag}={value}"))


def _own_fields(kind: type[BaseModel]) -> dict[str, FieldInfo]:
    """Of a family's version of a section, the fields that it adds or changes; of any other section, all."""
    base = next((each for each in kind.__mro__[1:] if each in (RunConfig, TrainingConfig, ModelConfig)), None)
    if base is None or not issubclass(base, BaseModel):
        return kind.model_fields
    return {
        name: field
        for name, field in kind.model_fields.items()
        if name not in base.model_fields or field.description != base.model_fields[name].description
    }


def rows(part: Part) -> list[Row]:
    """The values of one section; sections below it are left out.

    Raises:
        ValueError: a field without a docstring under it, or without an origin.
    """
    found = []
    for name, field in _own_fields(part.kind).items():
        if sections_in(field.annotation):
            continue
        key, origin = f"{part.name}.{name}".lstrip("."), origin_of(field)
        if not field.description or origin is None:
            raise ValueError(f"{part.kind.__name__}.{name} needs a docstring under it and an origin (config/facts.py)")
        values, default = values_of(field.annotation, field.metadata), _literal(field.get_default())
        found.append(
            Row(key, values, default, origin, part.is_free or is_free(field), " ".join(field.description.split()))
        )
    return found


def values_of(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """The values that a field takes, in words."""
    kind = get_origin(annotation)
    if kind is Literal:
        return ", ".join(_literal(value) for value in get_args(annotation))
    if kind in (Union, types.UnionType):
        return " or ".join(values_of(part) for part in get_args(annotation))
    if kind is tuple:
        return f"[{', '.join('...' if part is Ellipsis else values_of(part) for part in get_args(annotation))}]"
    if annotation is type(None):
        return "`null`"
    if hasattr(annotation, "__metadata__"):  # Annotated inside a union, such as PositiveInt | None
        return values_of(annotation.__origin__, list(annotation.__metadata__))
    names = {bool: "`true`, `false`", int: "integer", float: "number", str: "text", Path: "path"}
    words = names.get(annotation, getattr(annotation, "__name__", str(annotation)))
    signs = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}", "multiple_of": "multiple of {}"}
    bounds = []
    for entry in _flat(metadata):
        bounds += [
            sign.format(getattr(entry, name)) for name, sign in signs.items() if getattr(entry, name, None) is not None
        ]
    return f"{words} {', '.join(bounds)}" if bounds else words


def page() -> str:
    """The whole page."""
    found = [HEAD.format(presets=_presets_table())]
    for part in parts():
        heading = f"`{part.name}`" if part.name else "Top level"
        heading += f" with `{part.chosen_by}`" if part.chosen_by else ""
        title = " ".join((inspect.getdoc(part.kind) or "").split())
        lines = [
            f"## {heading}",
            "",
            title,
            "",
            "| key | values | default | origin | resume | meaning |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows(part):
            free = "free" if row.is_free else ""
            cells = (f"`{row.key}`", row.values, row.default, row.origin.value, free, row.meaning)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        found.append("\n".join(lines) + "\n")
    return "\n".join(found)


def _presets_table() -> str:
    lines = [
        "| preset | VAE layers x width | DiT layers x width | vocabulary | tokens per sequence | global batch | steps "
        "| precision |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in preset_names():
        config = load_config(name)
        if not isinstance(config, ColaConfig):
            continue
        vae, dit, training = config.model.vae, config.model.dit, config.training
        lines.append(
            f"| `{name}` | {vae.encoder_layers} + {vae.decoder_layers} x {vae.hidden_size} "
            f"| {dit.num_layers} x {dit.hidden_size} | {config.model.vocab_size:,} | {config.data.sequence_length} "
            f"| {training.global_batch_size:,} | {training.steps:,} | {training.precision} |"
        )
    return "\n".join(lines)


def _literal(value: Any) -> str:
    """A default as it would stand in an override."""
    if value is None:
        text = "null"
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, tuple):
        text = f"[{', '.join(map(str, value))}]"
    elif isinstance(value, float):
        # Whole numbers and decimals as people write them, small ones with an exponent.
        text = re.sub(r"e([+-])0*", r"e\1", repr(value)).replace("e+", "e")
    else:
        text = str(value)
    return f"`{text}`"


def _flat(metadata: Sequence[Any]) -> Iterator[Any]:
    for entry in metadata:
        yield from _flat(entry.metadata) if isinstance(entry, FieldInfo) else [entry]


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 done or current, 1 not current, 2 wrong use."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.config_reference",
        description="Write docs/configuration.md from the config tree.",
        epilog="example: python -m tools.config_reference --check",
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page is not current")
    check = parser.parse_args(arguments).check
    text = page()
    if not check:
        PAGE.write_text(text, encoding="utf-8")
        print(PAGE)
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE.name} is not current: run `python -m tools.config_reference`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
