"""`cola config`: the resolved tree."""

import typer

from launchers.output import print_json


def config(
    source: str = typer.Argument("tiny", help="A preset (tiny, small, base, paper-2b) or a YAML file."),
    overrides: list[str] = typer.Argument(None, help="section.key=value, as many as you like."),
    as_json: bool = typer.Option(False, "--json", help="JSON instead of YAML."),
) -> None:
    """Check a config and print it with every default filled in.

    Example: `cola config paper-2b model.dit.block_size=32`
    """
    from cola_megatron.config import dump_config, load_config, stored_tree

    resolved = load_config(source, overrides or [])
    if as_json:
        print_json(stored_tree(resolved))
    else:
        print(dump_config(resolved), end="")
