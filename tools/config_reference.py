"""Writes docs/configuration.md from the config tree: keys, values, defaults, and the docstrings under the fields.

python -m tools.config_reference           write the page
python -m tools.config_reference --check   exit code 1 where the page is not current
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from cola_megatron.config import RunConfig, load_config, preset_names
from cola_megatron.config.base import Section

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"


class Origin(StrEnum):
    """Where a default comes from."""

    PUBLISHED = "published"
    OURS = "ours"


# Defaults that the paper, its released package or its blog state, as whole sections or keys. Everything else is ours.
PUBLISHED = (
    "seed",
    "model.vocab_size",
    "model.vae",
    "model.dit",
    "objective.vae.posterior_term",
    "objective.flow.time.distribution",
    "objective.flow.time.loc",
    "objective.flow.time.per",
    "objective.flow.clean_prefix_probability",
    "training.steps",
    "training.global_batch_size",
    "training.precision",
    "training.vae_update.mode",
    "training.vae_update.joint_steps",
    "training.vae_update.frozen_steps",
    "training.vae_update.learning_rate_ratio",
    "training.optimizer.learning_rate",
    "training.optimizer.betas",
    "training.optimizer.weight_decay",
    "training.optimizer.clip",
    "training.schedule",
    "data.sequence_length",
    "data.seed",
)
# Inside those sections: the published sources leave the value open.
OURS = (
    "model.vae.shifting_factor",
    "model.vae.scaling_factor",
    "model.vae.init_std",
    "model.vae.init_cutoff_factor",
)

# Meanings of the fields that have no docstring of their own because their name says it where they stand.
MEANINGS = {
    "name": "Name of the run; a path component of letters, digits, `.`, `_`, `-`.",
    "runs_folder": "The run folder is `runs_folder/name`.",
    "seed": "Key of the starting weights and of every random draw of training.",
    "stage": "1 trains the Text VAE alone, 2 the VAE and the DiT.",
    "model.vocab_size": "Token ids; the embedding has one more row, for [MASK]. Must equal the shards'.",
    "model.vae.encoder_layers": "Blocks of the encoder.",
    "model.vae.decoder_layers": "Blocks of the decoder.",
    "model.vae.hidden_size": "Width of encoder and decoder.",
    "model.vae.num_attention_heads": "Heads; must divide `hidden_size`.",
    "model.vae.norm_eps": "Epsilon of every LayerNorm of the VAE.",
    "model.vae.query_key_norm_affine": "Affine parameters of the query and key norms.",
    "model.vae.qkv_bias": "Biases of the query, key and value matrices.",
    "model.vae.rotary_base": "Base theta of the rotary frequencies.",
    "model.vae.shifting_factor": "See `scaling_factor`.",
    "model.vae.init_std": "Standard deviation of the starting weights.",
    "model.dit.num_layers": "Blocks.",
    "model.dit.hidden_size": "Width.",
    "model.dit.num_attention_heads": "Heads; their width is `head_dim`, whatever `hidden_size` is.",
    "model.dit.head_dim": "Channels of one head.",
    "model.dit.ffn_expansion": "Width inside the feed-forward, in multiples of `hidden_size`.",
    "model.dit.norm_eps": "Epsilon of every LayerNorm of the DiT.",
    "model.dit.rotary_base": "Base theta of the rotary frequencies.",
    "model.dit.time_embedding_dim": "Channels of the sinusoid of the time.",
    "objective.flow.weight": "lambda_fm: weight of the flow-matching loss. Not published; ours.",
    "objective.flow.time.distribution": "Kind of distribution; `loc` and `scale` belong to `logit_normal`.",
    "objective.flow.time.scale": "Standard deviation before the sigmoid.",
    "training.steps": "Optimiser steps of the whole run.",
    "training.vae_update.joint_steps": "Steps of an interval in which the VAE is trained.",
    "training.vae_update.frozen_steps": "Steps of an interval in which it is not.",
    "training.optimizer.betas": "Decay of the first and second moments.",
    "training.optimizer.eps": "Added to the root of the second moment.",
    "training.schedule.initial_learning_rate": "Where the warm-up starts.",
    "training.schedule.warmup_steps": "Length of the warm-up; must be below `decay_steps`.",
    "training.schedule.final_learning_rate": "Where the cosine ends; at most `training.optimizer.learning_rate`.",
    "training.evaluation.every": "Steps between measurements; the last step always has one.",
    "training.checkpoint.every": "Steps between checkpoints; the last step always has one.",
    "training.checkpoint.keep_last": "Newest checkpoints that are kept.",
    "training.log.every": "Steps between records; the first and the last step always have one.",
    "training.log.wandb": "Mode of wandb; `offline` writes below the run folder and needs no network.",
    "training.log.wandb_project": "Project there.",
    "parallel.tensor_parallel_size": "Processes that share every matrix; must divide the heads of VAE and DiT.",
}

HEAD = """\
# Configuration

<!-- Written by `python -m tools.config_reference`. Edit the docstrings in cola_megatron/config, not this page. -->

One typed tree holds every setting of a run. A config is a preset or a YAML file, then overrides:

```
cola config paper-2b                                       # the whole tree with every default filled in
cola config base model.dit.block_size=32 --json            # the same, for scripts
cola train base stage=1 name=first data.path=data/corpus   # what `cola config` prints is what trains
```

An override is `section.key=value`; the value is read as YAML, so `null`, `true`, `1e-4` and `[0.9, 0.95]` mean what
they say. An unknown key, a wrong type or a combination that cannot run is refused before anything starts, in one line
that names the key, the value and what would be right. The resolved tree is stored with every run (`config.yaml`) and in
every checkpoint; [architecture.md](architecture.md#checkpoints) lists the keys that may change when a run is resumed.

**Origin** says where a default comes from. *published*: the paper (arXiv 2605.06548), its released package or its blog
states it. They disagree about two: the blog has one time per block, the released script one per sample; the VAE of the
paper's runs is causal, the released package defaults to block size 4. The defaults here are the former. *ours*: it is
not published, or it is about how this project runs. The weights of the losses, the mask ratio and the context dropout
for guidance are not published: the values here are choices of this project, not of the paper.

## Presets

{presets}

`paper-2b` is the published model and recipe. The files are in `cola_megatron/config/presets/`; a preset sets the keys
in its file, and the defaults below fill in the rest.
"""


@dataclass(frozen=True)
class Row:
    """One key of the tree."""

    key: str
    values: str
    default: str
    origin: Origin
    meaning: str


def sections(model: type[Section] = RunConfig, prefix: str = "") -> Iterator[tuple[str, type[Section]]]:
    """(dotted name, class) of a section and of all sections below it, in the order of the definitions."""
    yield prefix.rstrip("."), model
    for name, field in model.model_fields.items():
        if _is_section(field):
            yield from sections(field.annotation, f"{prefix}{name}.")


def rows(name: str, model: type[Section]) -> list[Row]:
    """The values of one section; sections below it are left out.

    Raises:
        ValueError: a field that has no docstring and no entry in `MEANINGS`.
    """
    docstrings = field_docstrings(model)
    found = []
    for field_name, field in model.model_fields.items():
        if _is_section(field):
            continue
        key = f"{name}.{field_name}" if name else field_name
        meaning = docstrings.get(field_name) or MEANINGS.get(key)
        if meaning is None:
            raise ValueError(f"{key} has no docstring under its field in {model.__module__} and none in MEANINGS")
        found.append(
            Row(key, values_of(field.annotation, field.metadata), _literal(field.default), origin(key), meaning)
        )
    return found


def origin(key: str) -> Origin:
    """Published or ours, by the lists above."""
    listed = any(key == entry or key.startswith(f"{entry}.") for entry in PUBLISHED)
    return Origin.PUBLISHED if listed and key not in OURS else Origin.OURS


def field_docstrings(model: type[Section]) -> dict[str, str]:
    """The string under each field of a class, on one line; fields without one are absent."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    found = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            found[statement.target.id] = " ".join(following.value.value.split())
    return found


def values_of(annotation: Any, metadata: list[Any] = ()) -> str:
    """The values that a field takes, in words."""
    kind = get_origin(annotation)
    if kind is Literal:
        return ", ".join(_literal(value) for value in get_args(annotation))
    if kind in (Union, types.UnionType):
        return " or ".join(values_of(part) for part in get_args(annotation))
    if kind is tuple:
        return f"[{', '.join(values_of(part) for part in get_args(annotation))}]"
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
    parts = [HEAD.format(presets=_presets_table())]
    for name, model in sections():
        heading = f"`{name}`" if name else "Top level"
        title = " ".join(inspect.getdoc(model).split())
        lines = [
            f"## {heading}",
            "",
            title,
            "",
            "| key | values | default | origin | meaning |",
            "|---|---|---|---|---|",
        ]
        for row in rows(name, model):
            cells = (f"`{row.key}`", row.values, row.default, row.origin.value, row.meaning)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _presets_table() -> str:
    lines = [
        "| preset | VAE layers x width | DiT layers x width | vocabulary | tokens per sequence | global batch | steps "
        "| precision |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in preset_names():
        config = load_config(name)
        vae, dit, training = config.model.vae, config.model.dit, config.training
        lines.append(
            f"| `{name}` | {vae.encoder_layers} + {vae.decoder_layers} x {vae.hidden_size} "
            f"| {dit.num_layers} x {dit.hidden_size} | {config.model.vocab_size:,} | {config.data.sequence_length} "
            f"| {training.global_batch_size:,} | {training.steps:,} | {training.precision} |"
        )
    return "\n".join(lines)


def _is_section(field: FieldInfo) -> bool:
    return inspect.isclass(field.annotation) and issubclass(field.annotation, Section)


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


def _flat(metadata: list[Any]) -> Iterator[Any]:
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
