"""What `cola prep inspect` prints."""

from collections import Counter
from pathlib import Path
from typing import Any

from data_prep.losses import examples_of
from data_prep.plan import open_plan
from data_prep.work import PLAN_NAME, WorkFolder
from launchers.prep_stats import read_statistics

Removed = dict[str, dict[str, dict[str, Any]]]
"""By source and rule: `documents`, how many went, and `examples` of them."""


def read_removed(folder: Path, rule: str | None = None) -> Removed:
    """Of a prepared folder, or of the finished tasks of a work folder; raises UserError."""
    sources = _of_work(WorkFolder(folder.absolute())) if (folder / PLAN_NAME).exists() else _of_output(folder)
    return {
        name: {each: found for each, found in rules.items() if rule is None or each == rule or _section(each) == rule}
        for name, rules in sources.items()
    }


def print_removed(sources: Removed) -> None:
    """A line per rule, and below it its examples."""
    for name, rules in sources.items():
        for rule, found in sorted(rules.items(), key=lambda item: -item[1]["documents"]):
            print(f"source {name}: {rule} removed {found['documents']:,} documents, for example")
            for example in found["examples"]:
                print(f"  {example['place']}{': ' if example['detail'] else ''}{example['detail']}")
                if example["text"]:
                    print(f"    {' '.join(example['text'].split())}")
        if not rules:
            print(f"source {name}: nothing was removed")


def _section(rule: str) -> str:
    return rule.partition("/")[0]


def _of_output(folder: Path) -> Removed:
    return {
        name: _found(source["removed"], source.get("examples", {}))
        for name, source in read_statistics(folder)["sources"].items()
    }


def _of_work(work: WorkFolder) -> Removed:
    plan = open_plan(work)
    removed: dict[str, Counter[str]] = {source.name: Counter() for source in plan.recipe.sources}
    for task, part in enumerate(plan.inputs):
        for step, key in (("clean", "removed"), ("tokenize", "bad")):
            if work.is_finished(step, task):
                removed[part.source].update(work.report(step, task)[key])
        for share in range(plan.shares):
            if work.is_finished("cluster", share):
                removed[part.source].update(work.report("cluster", share)["dropped"].get(str(task), {}))
    return {name: _found(+counts, examples_of(plan, work, name)) for name, counts in removed.items()}


def _found(removed: dict[str, int], examples: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {rule: {"documents": count, "examples": examples.get(rule, [])} for rule, count in removed.items()}
