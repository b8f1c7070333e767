"""`cola config`: the resolved tree, or how it differs from another."""

from typing import Any

import typer

from launchers.output import print_json


def config(
    source: str = typer.Argument("tiny", help="A preset, such as tiny or paper-2b-plaid, or a YAML file."),
    overrides: list[str] = typer.Argument(None, help="section.key=value, as many as you like."),
    against: str = typer.Option(
        None, help="Another preset or file: print what differs, which of two families says how far they are matched."
    ),
    as_json: bool = typer.Option(False, "--json", help="JSON instead of YAML or a table."),
) -> None:
    """Check a config and print it with every default filled in.

    Example: `cola config paper-2b model.dit.block_size=32`

    Example: `cola config paper-2b-autoregressive --against paper-2b`
    """
    from cola_megatron.config import dump_config, load_config, stored_tree

    resolved = load_config(source, overrides or [])
    if against is not None:
        _print_differences((source, against), resolved.model_dump(mode="json"), against, as_json)
    elif as_json:
        print_json(stored_tree(resolved))
    else:
        print(dump_config(resolved), end="")


def _print_differences(names: tuple[str, str], tree: dict[str, Any], against: str, as_json: bool) -> None:
    from cola_megatron.config import load_config
    from cola_megatron.evaluation.results import format_table
    from cola_megatron.interop.differences import ABSENT, unequal

    differing = list(unequal("", _leaves(tree), _leaves(load_config(against).model_dump(mode="json"))))
    if as_json:
        print_json({each.name: [None if value == ABSENT else value for value in each[1:]] for each in differing})
    elif differing:
        print(format_table([["key", *names], *([each.name, *map(_shown, each[1:])] for each in differing)]))
    else:
        print(f"{names[0]} and {names[1]} are the same")


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every key by its dotted name: a section that only one has is shown key by key."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            found |= _leaves(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _shown(value: Any) -> str:
    from cola_megatron.interop.differences import ABSENT

    return (
        "-"
        if value == ABSENT
        else "null"
        if value is None
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )
