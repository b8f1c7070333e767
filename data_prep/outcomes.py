"""What happened to the documents of every source: the `report.json` of a prepared folder."""

from __future__ import annotations

from collections import Counter
from typing import Any

from data_prep.contamination import added_up
from data_prep.losses import examples_of, losses_of, refuse_losses, refuse_unknown_tokens
from data_prep.pack import HELD_OUT, TRAIN
from data_prep.plan import Plan
from data_prep.work import WorkFolder

__all__ = ["report_of"]

EXAMPLES = 20


def report_of(plan: Plan, work: WorkFolder, tokenized: list[dict[str, Any]]) -> dict[str, Any]:
    """Adds up the reports of the tasks, by source.

    Args:
        tokenized: reports of the step `tokenize`, in order.

    Returns:
        `sources`: for each its parts, files left out, bytes, documents and characters read and kept, documents removed
        by each rule with examples of them, documents and characters per split, a histogram of lengths in tokens, tokens
        that the tokenizer does not know, and the round-trip check; `tokenizer_backend`: what encoded, with the proof
        that it gives the tokenizer's ids or the reason why it was not the faster one; `contamination`: what the
        decontamination hit, where there is one.

    Raises:
        DataPrepError: a source lost more to one rule than the recipe allows.
    """
    sources = {source.name: _source(plan, work, tokenized, source.name) for source in plan.recipe.sources}
    report: dict[str, Any] = {"sources": sources}
    if (backend := work.report("tokenizer", 0).get("backend")) is not None:  # absent in work of an older version
        report["tokenizer_backend"] = backend
    if plan.recipe.decontamination is not None:
        index = work.report("contamination", 0)
        found = (each["contamination"] for each in work.reports("clean", len(plan.inputs)))
        report["contamination"] = added_up(index["items"], index["searched"], found)
    return report


def _source(plan: Plan, work: WorkFolder, tokenized: list[dict[str, Any]], name: str) -> dict[str, Any]:
    tasks = [task for task, part in enumerate(plan.inputs) if part.source == name]
    read, removed = losses_of(plan, work, name)
    lengths: Counter[str] = Counter()
    round_trip: Counter[str] = Counter()
    examples: list[str] = []
    kept: Counter[str] = Counter()
    unknown = tokens = 0
    for task in tasks:
        each = tokenized[task]
        lengths.update(each["lengths"])
        round_trip.update({key: each["round_trip"][key] for key in ("checked", "different")})
        examples += each["round_trip"]["examples"]
        removed.update({"empty": each["empty"]})
        removed.update(each["bad"])
        unknown += each["unknown_tokens"]
        tokens += each["tokens"]
        for split in (TRAIN, HELD_OUT):
            kept.update({key: each["splits"][split][key] for key in ("documents", "characters")})
    if not plan.recipe.cleans:
        read.update({"documents": kept["documents"] + removed.total(), "characters": kept["characters"]})
    refuse_losses(plan, work, name, read["documents"], removed)
    refuse_unknown_tokens(plan, name, unknown, tokens)
    return {
        "parts": sum(len(plan.inputs[task].parts) for task in tasks),
        "left_out": [each.model_dump() for each in plan.left_out[name]],
        "bytes": sum(plan.inputs[task].bytes for task in tasks),
        "read": dict(read),
        "removed": {rule: count for rule, count in sorted(removed.items()) if count},
        "examples": examples_of(plan, work, name),
        "kept": dict(kept),
        "lengths": dict(sorted(lengths.items(), key=lambda item: int(item[0]))),
        "unknown_tokens": unknown,
        "round_trip": {**round_trip, "examples": examples[:EXAMPLES]},
    }
