"""`cola compare`: several runs side by side."""

from pathlib import Path
from typing import Literal

import typer

from launchers.output import print_json


def compare(
    runs: list[Path] = typer.Argument(..., help="Two run folders or more, of any stage, finished or not."),
    output: Path = typer.Option(None, help="Folder of comparison.html and its figures; by default `comparison`."),
    against: Literal["flops", "tokens"] = typer.Option(
        None, help="What curves are drawn against beside steps; by default flops, those of the model."
    ),
    page: bool = typer.Option(True, help="Write the page with the curves."),
    as_json: bool = typer.Option(False, "--json", help="JSON instead of the tables."),
) -> None:
    """Compare runs: figures and held-out metrics in a table, keys in which the configs differ, curves on one page.

    Example: `cola compare runs/first runs/second --output comparisons/first-second`

    Example: `cola compare runs/sweep/* --no-page --json`
    """
    from cola_megatron.config import ConfigError
    from cola_megatron.reporting import comparison
    from cola_megatron.reporting.compared_runs import read_runs

    if not page and (output is not None or against is not None):
        raise ConfigError("--output and --against are about the page: leave --no-page out, or them")
    found = read_runs(runs)
    written = None
    if page:
        from cola_megatron.reporting.compare_page import write_comparison

        written = write_comparison(output or Path("comparison"), found, against or "flops")
    if as_json:
        print_json({**comparison.as_json(found), "page": None if written is None else str(written)})
        return
    print(_columns(comparison.table(found)))
    for note in comparison.notes(found):
        print(f"note: {note}")
    differing = comparison.differences(found)
    _print_differences("configs differ in", [each for each in differing if not each.is_free])
    _print_differences("and in how they are run", [each for each in differing if each.is_free])
    if written is not None:
        print(f"\n{written}")


def _print_differences(title: str, differences: list) -> None:
    if differences:
        print(f"\n{title}\n" + _columns([[f"  {each.key}", *each.values] for each in differences]))


def _columns(rows: list[list[str]]) -> str:
    from cola_megatron.evaluation.results import format_table

    return format_table(rows)
