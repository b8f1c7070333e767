"""Tokenising with tiktoken against tokenizers: CPU time of the whole step, in alternating pairs; shards are compared.

python -m tools.bench_backends corpus.jsonl --tokenizer tokenizer.json --pairs 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from cola_megatron.config import resolve_tree
from cola_megatron.data import read_manifest
from data_prep.local import run_step
from data_prep.plan import make_plan
from data_prep.prepare import begin, finish
from data_prep.recipe import Recipe
from data_prep.steps import steps_of

BACKENDS = ("tokenizers", "tiktoken")


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("inputs", nargs="+", help="raw text, as `cola prep run` takes it")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.json")
    parser.add_argument("--input-format", default="auto", help="as `format` of a source")
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # CPU time of one thread, in this process
    seconds: dict[str, list[float]] = {name: [] for name in BACKENDS}
    proofs, files = [], []
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(arguments.pairs):
            for backend in BACKENDS:
                output = Path(folder, f"{backend}-{pair}")
                steps, megabytes = _prepare(arguments, backend, output)
                seconds[backend].append(steps["tokenize"])
                proofs.append(steps["tokenizer"])
                files.append(
                    {name: record.sha256 for name, record in read_manifest(output).files.items() if "/" in name}
                )
    middle = {name: statistics.median(each) for name, each in seconds.items()}
    answer = {
        "megabytes": megabytes,
        "megabytes_per_cpu_second": {name: round(megabytes / spent, 2) for name, spent in middle.items()},
        "ratio": round(middle["tokenizers"] / middle["tiktoken"], 2),
        "ratio_of_each_pair": [
            round(one / other, 2) for one, other in zip(seconds["tokenizers"], seconds["tiktoken"], strict=True)
        ],
        "proof_cpu_seconds": round(max(proofs), 2),
        "shards_are_equal": all(each == files[0] for each in files),
    }
    print(json.dumps(answer, indent=1))


def _prepare(arguments: argparse.Namespace, backend: str, output: Path) -> tuple[dict[str, float], float]:
    """CPU seconds of each step, and megabytes of text."""
    tree = {
        "output": str(output),
        "sources": [
            {"name": "text", "inputs": arguments.inputs, "format": arguments.input_format, "bad_documents": "skip"}
        ],
        "tokenizer": {"path": str(arguments.tokenizer), "backend": backend, "round_trip_share": 0.0},
    }
    plan = make_plan(resolve_tree(Recipe, tree))
    work = begin(plan)
    assert work is not None, "the output is new"
    seconds = {}
    for step in steps_of(plan):
        began = time.process_time()
        run_step(plan, work, step, workers=1, progress=False)
        seconds[step.name] = time.process_time() - began
    finish(plan, work)
    return seconds, sum(each.bytes for each in plan.inputs) / 1e6


if __name__ == "__main__":
    main()
