"""Speed of preparing data: every step in MB of text per second, and sharding against the bare tokenizer.

    python -m tools.bench_data corpus.jsonl --tokenizer tokenizer.json --workers 2

The bare tokenizer is `encode_batch_fast` of the same tokenizer on the same documents, already in memory, with as many
threads as there are workers: the floor of what sharding costs. Imports of the worker processes, some seconds once per
run, are left out. What sharding adds is reading and parsing, turning ids
into arrays, packing, writing and hashing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from cola_megatron.config import resolve_tree
from data_prep.documents import Document
from data_prep.local import run_step, start_workers
from data_prep.plan import Plan, make_plan
from data_prep.prepare import begin, finish
from data_prep.recipe import Recipe
from data_prep.steps import steps_of

SETTLE_SECONDS = 10.0


def main() -> None:
    """Prints a table, or with --json one object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("inputs", nargs="+", help="raw text, as `cola prep run` takes it")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.json")
    parser.add_argument("--end-of-text", default="<|endoftext|>")
    parser.add_argument("--padding", default="<|pad|>")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--format", choices=("mds", "webdataset"), default="mds")
    parser.add_argument("--input-format", default="auto", help="as `format` of a source")
    parser.add_argument("--clean", action="store_true", help="also clean and deduplicate, with the published rules")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        answer = measure(arguments, Path(folder))
    print(json.dumps(answer, indent=1) if arguments.json else _table(answer))


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds, characters and tokens of every step, and of the bare tokenizer."""
    tree = {
        "output": str(folder / "out"),
        "sources": [
            {"name": "text", "inputs": arguments.inputs, "format": arguments.input_format, "bad_documents": "skip"}
        ],
        "tokenizer": {
            "path": str(arguments.tokenizer),
            "end_of_text": arguments.end_of_text,
            "padding": arguments.padding,
            "round_trip_share": 0.0,
        },
        "shards": {"format": arguments.format},
        "task_bytes": 8 * 2**20,
        "most_removed": 1,  # the speed is asked for, not the corpus
    }
    if arguments.clean:
        sections = ("unicode", "gopher_quality", "gopher_repetition", "c4")
        tree["cleaning"] = {name: {} for name in sections}
        tree["deduplication"] = {"exact": True, "near": {}}
    plan = make_plan(resolve_tree(Recipe, tree))
    start_workers()
    time.sleep(SETTLE_SECONDS)
    bare = _bare_tokenizer(plan, arguments.workers)
    work = begin(plan)
    assert work is not None, "the output of the run before is removed"
    seconds = {}
    for step in steps_of(plan):
        began = time.perf_counter()
        run_step(plan, work, step, arguments.workers, progress=False)
        seconds[step.name] = time.perf_counter() - began
    finish(plan, work)
    report = json.loads((folder / "out" / "report.json").read_text())["sources"]["text"]
    manifest = json.loads((folder / "out" / "manifest.json").read_text())
    tokens = sum(stream["tokens"] for split in manifest["splits"].values() for stream in split.values())
    shutil.rmtree(folder / "out")
    megabytes = sum(part.bytes for part in plan.inputs) / 1e6
    return {
        "megabytes": megabytes,
        "documents": report["read"]["documents"],
        "tokens": tokens,
        "workers": arguments.workers,
        "steps": {
            name: {"seconds": spent, "megabytes_per_second": megabytes / spent} for name, spent in seconds.items()
        },
        "bare_tokenizer": bare,
        # With cleaning the two do not see the same text.
        "sharding": None if arguments.clean else _sharding(tokens / seconds["tokenize"], bare),
    }


def _sharding(tokens_per_second: float, bare: dict[str, float]) -> dict[str, float]:
    return {"tokens_per_second": tokens_per_second, "to_bare": tokens_per_second / bare["tokens_per_second"]}


def _bare_tokenizer(plan: Plan, threads: int) -> dict[str, float]:
    """The tokenizer alone, on the same documents: with threads, which is how it is fastest in one process."""
    import os

    os.environ["RAYON_NUM_THREADS"] = str(threads)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(plan.recipe.tokenizer.path))
    documents = (document for task in range(len(plan.inputs)) for document in plan.documents(task))
    texts = [document.text for document in documents if isinstance(document, Document)]
    tokenizer.encode_batch_fast(texts[:100], add_special_tokens=False)
    began = time.perf_counter()
    tokens = sum(
        len(encoding)
        for start in range(0, len(texts), 1000)
        for encoding in tokenizer.encode_batch_fast(texts[start : start + 1000], add_special_tokens=False)
    )
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds}


def _table(answer: dict[str, Any]) -> str:
    lines = [
        f"{answer['megabytes']:.1f} MB, {answer['documents']:,} documents, {answer['tokens']:,} tokens, "
        f"{answer['workers']} workers",
        *(
            f"{name:<14} {step['seconds']:8.1f} s {step['megabytes_per_second']:8.2f} MB/s"
            for name, step in answer["steps"].items()
        ),
        f"bare tokenizer {answer['bare_tokenizer']['seconds']:8.1f} s "
        f"{answer['bare_tokenizer']['tokens_per_second']:,.0f} tokens/s",
    ]
    if answer["sharding"] is not None:
        lines.append(
            f"sharding       {answer['sharding']['tokens_per_second']:,.0f} tokens/s: "
            f"{answer['sharding']['to_bare']:.0%} of the bare tokenizer"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
