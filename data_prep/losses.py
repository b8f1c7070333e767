"""What a preparation must not lose in silence: said at its end, and refused where it can hardly be meant."""

from __future__ import annotations

from collections import Counter
from typing import Any

from cola_megatron.data.manifest import Manifest
from cola_megatron.data.mixture import passes_and_shares
from data_prep.documents import LeftOut
from data_prep.errors import DataPrepError
from data_prep.examples import Example, merged
from data_prep.plan import Plan
from data_prep.work import WorkFolder

__all__ = [
    "examples_of",
    "left_out_lines",
    "losses_of",
    "refuse_losses",
    "refuse_missing_urls",
    "refuse_unknown_tokens",
    "summary",
]

# Lines of a terminal; the report names all.
NAMED = 20
# Why a tokenizer was not encoded by tiktoken, where that is no surprise.
EXPECTED_BACKEND_REASONS = ("asked for", "little text")


def losses_of(plan: Plan, work: WorkFolder, name: str) -> tuple[Counter[str], Counter[str]]:
    """Documents, characters and URLs read of a source, and documents removed by each rule before `tokenizer`."""
    read: Counter[str] = Counter()
    removed: Counter[str] = Counter()
    for task, part in enumerate(plan.inputs):
        if part.source != name or not plan.recipe.cleans:
            continue
        cleaned = work.report("clean", task)
        removed.update(cleaned["removed"])
        read.update({key: cleaned[key] for key in ("documents", "characters", "with_url")})
    if plan.recipe.deduplication is not None:
        for dropped in work.reports("cluster", plan.shares):
            for task, part in enumerate(plan.inputs):
                if part.source == name:
                    removed.update(dropped["dropped"].get(str(task), {}))
    return read, removed


def examples_of(plan: Plan, work: WorkFolder, name: str) -> dict[str, list[Example]]:
    """Examples of the documents of a source that each rule removed, by the tasks that are finished."""
    tasks = [task for task, part in enumerate(plan.inputs) if part.source == name]
    steps = ("clean", "tokenize") if plan.recipe.cleans else ("tokenize",)
    finished = [(step, task) for step in steps for task in tasks if work.is_finished(step, task)]
    return merged(work.report(step, task).get("examples", {}) for step, task in finished)


def refuse_losses(plan: Plan, work: WorkFolder, name: str, documents: int, removed: dict[str, int]) -> None:
    """Raises DataPrepError where one rule removes more of a source than its recipe allows."""
    allowed = plan.recipe.most_removed_of(plan.recipe.source(name))
    rule = max(removed, key=lambda rule: removed[rule], default=None)
    if rule is not None and removed[rule] > allowed * documents:
        share = f"{removed[rule]:,} of {documents:,} documents ({removed[rule] / documents:.1%})"
        first = next(iter(examples_of(plan, work, name).get(rule, ())), None)
        shown = f" (the first: {': '.join(filter(None, (first['place'], first['detail'])))})" if first else ""
        raise DataPrepError(
            f"source {name}: {rule} removes {share}, most_removed allows {allowed:.1%}{shown}; look at them with `cola "
            f"prep inspect {work.path}`, change the rule or the source, or, if it is meant, raise most_removed of this "
            "source and run again (finished tasks are kept)"
        )


def refuse_missing_urls(plan: Plan, name: str, read: Counter[str]) -> None:
    """Raises DataPrepError where a source's documents all lack the URL that its rules are about."""
    field = plan.recipe.source(name).url_field
    if field is not None and read["documents"] and not read["with_url"]:
        raise DataPrepError(
            f"source {name}: none of its {read['documents']:,} documents has a URL in {field!r}; set url_field to the "
            "field that has it, or leave it out"
        )


def refuse_unknown_tokens(plan: Plan, name: str, unknown: int, tokens: int) -> None:
    """Raises DataPrepError where more tokens of a source are the tokenizer's unknown one than `most_removed`."""
    allowed = plan.recipe.most_removed_of(plan.recipe.source(name))
    if unknown > allowed * tokens:
        raise DataPrepError(
            f"source {name}: {unknown:,} of {tokens:,} tokens ({unknown / tokens:.1%}) are the tokenizer's token for "
            "what it does not know; give a tokenizer of this language, or raise most_removed of this source"
        )


def left_out_lines(left_out: dict[str, list[LeftOut]], most: int = NAMED) -> list[str]:
    """A line per file that an input shows and no task reads, beyond `most` of a source their number."""
    lines = []
    for name, files in left_out.items():
        lines += [f"source {name}: leaves out {each.location} ({each.why})" for each in files[:most]]
        if len(files) > most:
            lines.append(
                f"source {name}: leaves out {len(files) - most:,} more; `cola prep stats --json` names them all"
            )
    return lines


def summary(report: dict[str, Any], manifest: Manifest) -> list[str]:
    """A line per source: what was read, what each rule removed, what is left, and how training sees it."""
    seen = passes_and_shares(manifest)
    lines = []
    for name, source in report["sources"].items():
        documents, kept = source["read"].get("documents", 0), source["kept"].get("documents", 0)
        line = f"source {name}: {documents:,} documents read, {kept:,} kept"
        removed = sorted(source["removed"].items(), key=lambda item: -item[1])
        if removed:
            line += "; removed " + ", ".join(f"{rule} {count:,} ({count / documents:.1%})" for rule, count in removed)
        if source["unknown_tokens"]:
            line += f"; {source['unknown_tokens']:,} tokens the tokenizer does not know"
        if name in seen:
            passes, share = seen[name]
            line += f"; {share:.1%} of the training samples, each sequence {passes:.3g} times an epoch"
        else:
            line += "; NOTHING of it is in training: its documents do not fill one sequence"
        lines.append(line)
        damaged = source.get("examples", {}).get("bad_archive", [])
        lines += [f"source {name}: damaged: {each['place']}: {each['detail']}" for each in damaged]
    reason = report.get("tokenizer_backend", {}).get("reason")
    if reason not in (None, *EXPECTED_BACKEND_REASONS):
        lines.append(f"encoded by tokenizers, not by the faster tiktoken: {reason}")
    return lines
