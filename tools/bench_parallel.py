"""Step time and bytes sent for each layout: the same model and global batch, in real processes on this machine.

    python -m tools.bench_parallel                                     the layouts of docs/parallelism.md
    python -m tools.bench_parallel --layouts one tp2-sp pp4-dp2        others: tpN, sp, cpN, ppN, dpN, zeroN
    python -m tools.bench_parallel --preset base --rounds 3 training.global_batch_size=64
    python -m tools.bench_parallel --bubble                            two stages over 1, 2, 4 and 8 micro-batches

With CUDA every rank has a GPU of its own (nccl), and layouts with more ranks than GPUs are left out; without it all
ranks share the cores (gloo), and a time with more ranks than cores says nothing about speed-up. What is counted is said
in tools/communication_counter.py; predicted bytes are those of cola_megatron/planning/communication.py.
"""

import argparse
import datetime
import json
import os
import shlex
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import torch

from cola_megatron.config import ConfigError, load_config
from cola_megatron.records.provenance import versions
from tools.bench_layouts import Layout, run_bubble, run_layouts
from tools.communication_counter import CONTEXT, DATA, PIPELINE, TENSOR

LAYOUTS = (
    *("one", "tp2", "tp2-sp", "pp2", "pp4"),
    *("dp2-zero0", "dp2-zero1", "dp2-zero2", "dp2-zero3"),
    *("tp2-dp2", "tp2-pp2", "tp2-pp2-dp2"),
)
# Seconds a step on one core, and matrices as large as DeepSpeed's ZeRO 3 wants them: it does not partition parameters
# of fewer than 100,000 elements.
SIZE = (
    "model.vocab_size=4096",
    "model.dit.num_layers=6",
    "data.sequence_length=64",
    "training.global_batch_size=16",
    "training.micro_batch_size=2",
    "training.precision=fp32",
    "parallel.reduce_bucket_size=5000000",
)


def time_table(found: dict[str, Any]) -> Iterator[str]:
    """Rows of Markdown: step times and their ratios to one process, and the processor time of all ranks together.

    The fastest step is the one least disturbed by what else the machine does.
    """
    yield "| layout | processes | median step, s | times one | fastest, s | times one | processor time, s |"
    yield "|---|---|---|---|---|---|---|"
    alone = found.get("one", {}).get("steps")
    for name, figures in found.items():
        if "steps" not in figures:
            reason = f"left out: {figures['left_out']}" if "left_out" in figures else f"failed: {figures['failed']}"
            yield f"| {name} | - | {reason} | - | - | - | - |"
            continue
        cells = [name, str(figures["processes"])]
        for typical in (statistics.median, min):
            seconds = typical(figures["steps"])
            cells += [f"{seconds:.2f}", f"{seconds / typical(alone):.2f}" if alone else "-"]
        yield f"| {' | '.join(cells)} | {figures['processor_seconds']:.2f} |"


def byte_table(found: dict[str, Any]) -> Iterator[str]:
    """Rows of Markdown: bytes of one step, of the rank that sends most, by kind of group."""
    yield "| layout | group | handed over, MB | on the wire, MB | predicted, MB | measured / predicted |"
    yield "|---|---|---|---|---|---|"
    for name, figures in found.items():
        for kind in (TENSOR, CONTEXT, PIPELINE, DATA):
            rank = max(figures.get("ranks", ()), key=lambda rank: rank["wire"].get(kind, 0.0), default=None)
            if rank is None or not rank["wire"].get(kind):
                continue
            payload, wire, expected = (rank[key][kind] for key in ("payload", "wire", "predicted_wire"))
            ratio = f"{wire / expected:.3f}" if expected else "not predicted"
            yield f"| {name} | {kind} | {payload / 1e6:.3f} | {wire / 1e6:.3f} | {expected / 1e6:.3f} | {ratio} |"


def bubble_table(rows: list[dict[str, float]]) -> Iterator[str]:
    """Rows of Markdown: idle shares by number of micro-batches."""
    yield "| micro-batches | one process, s | two stages, s | idle | equal stages, predicted | as cut, predicted |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        shares = (row["idle_share"], row["predicted_equal_stages"], row["predicted_these_stages"])
        times = f"{row['one_process']:.2f} | {row['two_stages']:.2f}"
        yield f"| {row['micro_batches']} | {times} | {' | '.join(f'{share:.0%}' for share in shares)} |"


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; exits with 2 for a wrong use."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_parallel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config, before those of a layout")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), help="default: %(default)s")
    parser.add_argument("--preset", help="a preset or config file; default: `small`, cut down to seconds a step")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each run (%(default)s)")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them (%(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each layout (%(default)s)")
    parser.add_argument("--bubble", action="store_true", help="instead: two stages over 1, 2, 4 and 8 micro-batches")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, with every rank's transfers")
    options = parser.parse_intermixed_args(arguments)
    if min(options.steps, options.rounds) < 1 or options.warm_up < 0:
        parser.error("--steps and --rounds must be at least 1, --warm-up at least 0")
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 done, 1 a layout failed, 2 wrong use."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    source, overrides = options.preset or "small", [*(() if options.preset else SIZE), *options.overrides]
    about: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": _machine(),
        "load_before": os.getloadavg()[0],
        "versions": versions(),
        "command": shlex.join(["python", "-m", "tools.bench_parallel", *arguments]),
    }
    often = options.warm_up, options.steps, options.rounds
    found: dict[str, Any]
    try:
        load_config(source, overrides)  # a mistake in it is not the layouts' own
        if options.bubble:
            found = {"bubble": run_bubble(source, overrides, *often)}
        else:
            found = {"layouts": run_layouts(list(map(Layout.parse, options.layouts)), source, overrides, *often)}
    except ConfigError as error:
        print(f"bench_parallel: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps({**about, **found}, indent=1))
    else:
        print(f"{about['date']}, {about['machine']}, torch {about['versions']['torch']}: {about['command']}\n")
        tables = (
            bubble_table(found["bubble"])
            if options.bubble
            else (*time_table(found["layouts"]), "", *byte_table(found["layouts"]))
        )
        print("\n".join(tables))
    return int(any("failed" in figures for figures in found.get("layouts", {}).values()))


def _machine() -> str:
    gpus = torch.cuda.device_count()
    return f"{gpus} x {torch.cuda.get_device_name(0)}" if gpus else f"CPU, {os.cpu_count()} cores"


if __name__ == "__main__":
    sys.exit(main())
