"""What to run first on a GPU machine: parity, training, resuming and generation with their figures.

    python -m tools.gpu_check                       everything, at the size `base` (minutes)
    python -m tools.gpu_check --quick --json        fewer steps; one JSON document on stdout
    python -m tools.gpu_check --markdown            rows for the table in docs/gpu.md
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
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tools.gpu_setting import Check, Record, Setting


def run_checks(
    checks: Mapping[str, Check], setting: Setting, say: Callable[[Record], None] = lambda record: None
) -> list[Record]:
    """All records, each handed to `say` as soon as it is there; a check that raises gives one failed record."""
    from tools.gpu_setting import Record, release_memory

    records = []
    for name, check in checks.items():
        try:
            found = check(setting)
        except Exception:
            last_line = traceback.format_exc().strip().splitlines()[-1]
            found = [Record(name, False, None, "", last_line)]
        release_memory()
        for record in found:
            say(record)
        records += found
    return records


def line(record: Record) -> str:
    """A record for people."""
    return f"{'ok    ' if record.ok else 'FAILED'} {record.name:<31} {figure(record):<27} {record.detail}"


def figure(record: Record) -> str:
    """Value and unit."""
    return "-" if record.value is None else f"{record.value:,.5g} {record.unit}"


def markdown_row(record: Record, about: Mapping[str, Any]) -> str:
    """A row of the table in docs/gpu.md."""
    used = ", ".join(f"{name} {about['versions'][name]}" for name in ("torch", "cuda") if name in about["versions"])
    cells = (about["date"], about["machine"], used, f"`{about['command']}`", f"{record.name}: {figure(record)}")
    return f"| {' | '.join(cells)} |"


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; exits with 2 for a wrong use."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_check",
        description="Check parity, training, resuming and generation on a GPU, with their figures.",
        epilog="example: python -m tools.gpu_check --only golden --only train.stage2",
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps: for a first look, not for figures")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="one JSON document on stdout; progress goes to stderr")
    output.add_argument("--markdown", action="store_true", help="rows for the table in docs/gpu.md on stdout")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu tests the logic of the checks at the size tiny"
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="checks whose name starts so; repeat for more")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 all passed, 1 one failed or no CUDA, 2 wrong use."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS does not repeat its sums
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch  # after the environment is set, and after the options: --help must not wait for it

    if options.device == "cuda" and not torch.cuda.is_available():
        return _fail("torch sees no CUDA device; run this on a GPU machine, or test its logic with --device cpu", 1)
    progress = sys.stderr if options.json or options.markdown else sys.stdout
    # Libraries print and warn while they set up; what a person or a script reads must not have that.
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cola_megatron.parallel import initialize_parallel
        from tools import gpu_checks, gpu_setting

        available = gpu_checks.all_checks(options.quick)
        checks, unknown = _selected(available, options.only)
        if unknown:
            return _fail(f"--only {unknown}: no such check; there are {', '.join(available)}", 2)
        setting = gpu_setting.Setting(initialize_parallel(), options.quick)
        records = run_checks(checks, setting, lambda record: print(line(record), file=progress, flush=True))
        about = {
            "date": datetime.date.today().isoformat(),
            "machine": gpu_setting.machine(setting),
            "versions": gpu_setting.software(),
            "command": shlex.join(["python", "-m", "tools.gpu_check", *arguments]),
        }
    failed = [record.name for record in records if not record.ok]
    print(f"{len(records) - len(failed)} of {len(records)} passed", file=progress)
    if options.json:
        print(json.dumps({**about, "records": [asdict(record) for record in records]}, indent=1))
    if options.markdown:
        _print_rows(records, about, sys.stdout)
    return 1 if failed else 0


def _selected(checks: dict[str, Check], prefixes: list[str] | None) -> tuple[dict[str, Check], str | None]:
    """The checks whose names start with one of the prefixes, and the first prefix that fits none."""
    if prefixes is None:
        return checks, None
    unknown = next((prefix for prefix in prefixes if not any(name.startswith(prefix) for name in checks)), None)
    return {name: check for name, check in checks.items() if name.startswith(tuple(prefixes))}, unknown


def _print_rows(records: list[Record], about: Mapping[str, Any], file: TextIO) -> None:
    for record in records:
        if record.ok and record.value is not None:
            print(markdown_row(record, about), file=file)


def _fail(message: str, code: int) -> int:
    print(f"gpu_check: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
