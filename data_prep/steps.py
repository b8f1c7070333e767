"""The steps of a preparation, in order. Every step is a number of tasks that know nothing of one another.

contamination   1 task            n-grams of the evaluation sets                     with `decontamination`
clean           one per input     documents repaired, kept or removed; their hashes  with any rule
match           key x share       pairs of documents with an equal key               with `deduplication`
group           1 task            which of these pairs belong together               with `deduplication`
cluster         one per share     which documents stay                               with `deduplication`
tokenizer       1 task            copied or trained
tokenize        one per input     sequences in shards
merge           1 task            one folder, one index per split, the manifest
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep import step_clean, step_deduplicate, step_merge, step_tokenize, step_tokenizer
from data_prep.plan import Plan
from data_prep.work import WorkFolder

__all__ = ["Step", "run_task", "steps_of"]

Advance = Callable[[int], None]
Work = Callable[[Plan, WorkFolder, int, Path, Advance], dict[str, Any]]


@dataclass(frozen=True)
class Step:
    """One step: its tasks may run in any order and at once, after all tasks of the step before."""

    name: str
    tasks: int
    work: Work
    """Does task n of the plan: (plan, finished tasks, n, folder to fill, progress) -> report. `progress` is called
    with bytes of the inputs read."""
    reads_inputs: bool = False
    """Whether task n reads input n, and its progress is in bytes; otherwise in tasks."""
    depends_on_its_input_alone: bool = False
    """Whether task n stays as it is when other inputs change."""


def steps_of(plan: Plan) -> list[Step]:
    """What this plan needs, in order; the last is `merge`."""
    recipe, inputs = plan.recipe, len(plan.inputs)
    steps = []
    if recipe.decontamination is not None:
        steps.append(Step("contamination", 1, step_clean.index_evaluation_sets))
    if recipe.cleans:
        steps.append(Step("clean", inputs, step_clean.clean_input, reads_inputs=True, depends_on_its_input_alone=True))
    if recipe.deduplication is not None:
        keys = step_deduplicate.keys_of(recipe.deduplication)
        steps.append(Step("match", keys * plan.shares, step_deduplicate.match))
        steps.append(Step("group", 1, step_deduplicate.group))
        steps.append(Step("cluster", plan.shares, step_deduplicate.cluster))
    steps.append(Step("tokenizer", 1, step_tokenizer.place_tokenizer))
    # A trained tokenizer, and which of two duplicates stays, depend on all inputs.
    alone = recipe.tokenizer.path is not None and recipe.deduplication is None
    steps.append(
        Step("tokenize", inputs, step_tokenize.tokenize_input, reads_inputs=True, depends_on_its_input_alone=alone)
    )
    steps.append(Step("merge", 1, step_merge.merge))
    return steps


def run_task(plan: Plan, work: WorkFolder, step: Step, task: int, advance: Advance = lambda count: None) -> None:
    """Runs one task to its end, unless it is finished; raises DataPrepError."""
    work.run(step.name, task, lambda folder: step.work(plan, work, task, folder, advance))
