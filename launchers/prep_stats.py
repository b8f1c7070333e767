"""What `cola prep stats` prints."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cola_megatron.data.manifest import ShardError, read_manifest
from cola_megatron.data.mixture import passes_and_shares
from data_prep.documents import LeftOut
from data_prep.losses import left_out_lines
from data_prep.work import REPORT_NAME


def read_statistics(folder: Path) -> dict[str, Any]:
    """The report of a prepared folder, with the streams of its splits; raises ShardError."""
    manifest = read_manifest(folder)
    path = folder / REPORT_NAME
    try:
        report = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ShardError(f"{path}: cannot be read ({error}); prepare the folder again") from error
    return {
        **report,
        "splits": manifest.model_dump(mode="json")["splits"],
        "mixture": {name: share for name, (_, share) in passes_and_shares(manifest).items()},
    }


def print_statistics(statistics: dict[str, Any]) -> None:
    """Three tables: the sources, the rules, the splits; and what the decontamination found."""
    console = Console(width=None if Console().is_terminal else 160)
    sources = statistics["sources"]
    console.print(_sources(sources))
    left_out = {name: [LeftOut(**each) for each in source.get("left_out", [])] for name, source in sources.items()}
    for line in left_out_lines(left_out):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if any(source["removed"] for source in sources.values()):
        console.print(_removed(sources))
    console.print(_splits(statistics))
    if "contamination" in statistics:
        console.print(_contamination(statistics["contamination"]))
    for name, source in sources.items():
        check = source["round_trip"]
        if check["different"]:
            console.print(
                f"{name}: {check['different']:,} of {check['checked']:,} documents change when they are tokenised and "
                f"decoded, for example {', '.join(check['examples'][:3])}: the tokenizer cannot write all it reads"
            )


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _sources(sources: dict[str, Any]) -> Table:
    table = _table("Sources", "source", "parts", "bytes", "documents read", "kept", "characters kept")
    for name, source in sources.items():
        read, kept = source["read"].get("documents", 0), source["kept"].get("documents", 0)
        share = f"{kept:,} ({kept / read:.1%})" if read else "0"
        characters = source["kept"].get("characters", 0)
        table.add_row(name, f"{source['parts']:,}", f"{source['bytes']:,}", f"{read:,}", share, f"{characters:,}")
    return table


def _removed(sources: dict[str, Any]) -> Table:
    table = _table("Removed documents", "rule", *sources)
    for rule in sorted({rule for source in sources.values() for rule in source["removed"]}):
        table.add_row(rule, *(f"{source['removed'].get(rule, 0):,}" for source in sources.values()))
    return table


def _splits(statistics: dict[str, Any]) -> Table:
    table = _table("Splits", "split/source", "documents", "sequences", "tokens", "padding", "dropped", "training share")
    for split, streams in statistics["splits"].items():
        for name, record in streams.items():
            share = f"{statistics['mixture'][name]:.1%}" if split == "train" else ""
            table.add_row(
                f"{split}/{name}",
                f"{record['documents']:,}",
                f"{record['sequences']:,}",
                f"{record['tokens']:,}",
                f"{record['padding_tokens']:,} ({record['padding_tokens'] / record['tokens']:.2%})",
                f"{record['dropped_tokens']:,}",
                share,
            )
    return table


def _contamination(found: dict[str, Any]) -> Table:
    table = _table(
        "Evaluation items found in documents, which were removed", "task", "items", "searched", "found", "documents"
    )
    for task, each in found.items():
        table.add_row(task, *(f"{each[key]:,}" for key in ("items", "searched", "found", "documents")))
    return table
