"""What to run first on a GPU machine: ceilings, parity, training, checkpoints and generation with their figures.

    python -m tools.gpu_check --output check.jsonl  everything (within ten minutes); figures are in the file at once
    python -m tools.gpu_check --quick --json        fewer steps and sizes; one JSON document on stdout
    python -m tools.gpu_check --only step.paper-2b  the checks whose names start so; --list prints all names
    python -m tools.gpu_check --rows check.jsonl    rows for the table in docs/gpu.md, of a file, cut off or not
    python -m tools.gpu_check --quick --device cpu  the logic of the checks, at the size `tiny`, without a GPU

A check that fails does not stop the others. Exit codes: 0 all passed, 1 one failed or there is no CUDA, 2 wrong use.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.gpu_log import RecordFile, line, markdown_rows, read_log

if TYPE_CHECKING:
    from tools.gpu_setting import Check, Record, Setting


def run_checks(
    checks: Mapping[str, Check],
    setting: Setting,
    say: Callable[[Record], None] = lambda record: None,
    took: Callable[[str, float], None] = lambda name, seconds: None,
) -> list[Record]:
    """All records, each handed to `say` as soon as it is there; a check that raises ends with one failed record."""
    from tools.gpu_setting import Record, forget_compiled, release_memory

    records: list[Record] = []

    def keep(record: Record) -> None:
        records.append(record)
        say(record)

    for name, check in checks.items():
        began = time.perf_counter()
        try:
            for record in check(setting):
                keep(record)
        except Exception:
            traceback.print_exc()
            keep(Record(name, False, None, "", traceback.format_exc().strip().splitlines()[-1]))
        forget_compiled()
        release_memory()
        took(name, time.perf_counter() - began)
    return records


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; exits with 2 for a wrong use."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_check",
        description="Check ceilings, parity, training, checkpoints and generation on a GPU, with their figures.",
        epilog="example: python -m tools.gpu_check --only golden --only step.paper-2b --output check.jsonl",
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps and sizes: for a first look, not for figures")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="one JSON document on stdout; progress goes to stderr")
    output.add_argument("--markdown", action="store_true", help="rows for the table in docs/gpu.md on stdout")
    output.add_argument("--list", action="store_true", help="print the names of the checks, and run none")
    output.add_argument("--rows", type=Path, metavar="FILE", help="rows for that table, of what an --output holds")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write each figure as it comes, one JSON object a line"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu tests the logic of the checks at the size tiny"
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="checks whose name starts so; repeat for more")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 all passed, 1 one failed or no CUDA, 2 wrong use."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if options.rows is not None:
        return _print_rows_of(options.rows)
    _set_environment(options.device)
    import torch  # after the environment is set, and after the options: --help must not wait for it

    if options.device == "cuda" and not options.list and not torch.cuda.is_available():
        return _fail("torch sees no CUDA device; run this on a GPU machine, or test its logic with --device cpu", 1)
    progress = sys.stderr if options.json or options.markdown else sys.stdout
    # Libraries print and warn while they set up; what a person or a script reads must not have that.
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tools import gpu_checks

        available = gpu_checks.all_checks(options.quick)
        checks, unknown = _selected(available, options.only)
        if unknown:
            return _fail(f"--only {unknown}: no such check; there are {', '.join(available)}", 2)
        if not options.list:
            about = _about(options, arguments)
            records, seconds = _run(checks, options, about, lambda text: print(text, file=progress, flush=True))
    if options.list:
        print("\n".join(checks))
        return 0
    failed = [record.name for record in records if not record.ok]
    print(f"{len(records) - len(failed)} of {len(records)} passed", file=progress)
    if options.json:
        print(json.dumps({**about, "seconds": seconds, "records": [asdict(record) for record in records]}, indent=1))
    if options.markdown:
        print("\n".join(markdown_rows(records, about)))
    return 1 if failed else 0


def _set_environment(device: str) -> None:
    """What must stand before CUDA is initialised; a value that the user set stays."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS does not repeat its sums
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # sizes differ from check to check
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _about(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    from tools import gpu_setting

    return {
        "date": datetime.date.today().isoformat(),
        "machine": gpu_setting.machine(options.device),
        "versions": gpu_setting.software(),
        "command": shlex.join(["python", "-m", "tools.gpu_check", *arguments]),
    }


def _run(
    checks: dict[str, Check], options: argparse.Namespace, about: dict[str, Any], show: Callable[[str], None]
) -> tuple[list[Record], dict[str, float]]:
    """The records, and the seconds of each check."""
    from cola_megatron.parallel import initialize_parallel
    from tools.gpu_setting import Setting

    seconds: dict[str, float] = {}
    with RecordFile(options.output, about) as file:

        def say(record: Record) -> None:
            file.record(record)
            show(line(record))

        def took(name: str, passed: float) -> None:
            seconds[name] = passed
            file.check(name, passed)
            show(f"       {name} took {passed:.1f} s")

        records = run_checks(checks, Setting(initialize_parallel(), options.quick), say, took)
        file.end([record.name for record in records if not record.ok])
    return records, seconds


def _selected(checks: dict[str, Check], prefixes: list[str] | None) -> tuple[dict[str, Check], str | None]:
    """The checks whose names start with one of the prefixes, and the first prefix that fits none."""
    if prefixes is None:
        return checks, None
    unknown = next((prefix for prefix in prefixes if not any(name.startswith(prefix) for name in checks)), None)
    return {name: check for name, check in checks.items() if name.startswith(tuple(prefixes))}, unknown


def _print_rows_of(path: Path) -> int:
    try:
        log = read_log(path)
    except (OSError, ValueError) as error:
        return _fail(str(error), 2)
    print("\n".join(markdown_rows(log.records, log.about)))
    if not log.ended:
        print(f"gpu_check: {path}: the run was cut off, so that checks are missing", file=sys.stderr)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"gpu_check: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
