"""Steps `contamination` and `clean`: the rules that look at one document, and what later steps need to know of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.clean import Cleaner, Removed
from data_prep.contamination import ContaminationCounter
from data_prep.decontaminate import ContaminationIndex
from data_prep.deduplicate import Signatures
from data_prep.documents import BadDocument
from data_prep.examples import Examples
from data_prep.kept_documents import CLEANED_NAME, CleanedWriter
from data_prep.plan import Plan
from data_prep.work import WorkFolder

__all__ = ["clean_input", "index_evaluation_sets"]

CONTAMINATED = "contamination"


def index_evaluation_sets(
    plan: Plan, work: WorkFolder, task: int, folder: Path, advance: Callable[[int], None]
) -> dict[str, Any]:
    """Leaves the index of the n-grams of the evaluation sets."""
    settings = plan.recipe.decontamination
    assert settings is not None, "a step of recipes that have them"
    index = ContaminationIndex.build(settings)
    index.save(folder)
    return {"items": index.items, "searched": index.searched}


def clean_input(
    plan: Plan, work: WorkFolder, task: int, folder: Path, advance: Callable[[int], None]
) -> dict[str, Any]:
    """Leaves the kept documents, repaired, and their signatures where duplicates are looked for.

    The report holds `documents` and `characters` read, those `with_url`, `removed` by rule with `examples`, and
    `contamination` by evaluation task.
    """
    recipe, source = plan.recipe, plan.recipe.source(plan.inputs[task].source)
    clean = Cleaner(recipe.cleaning_of(source))
    signatures = Signatures(recipe.deduplication) if recipe.deduplication is not None else None
    contamination = None
    if recipe.decontamination is not None:
        contamination = ContaminationCounter(ContaminationIndex.load(work.folder("contamination", 0)))
    removed: Counter[str] = Counter()
    examples = Examples()
    documents = characters = with_url = 0
    with CleanedWriter(folder / CLEANED_NAME) as writer:
        for document in plan.documents(task):
            advance(document.bytes_read)
            documents += 1
            if isinstance(document, BadDocument):
                removed[document.rule] += 1
                examples.add(document.rule, document.place, document.message)
                continue
            characters += len(document.text)
            with_url += document.url is not None
            kept = clean(document)
            if isinstance(kept, Removed):
                removed[kept.rule] += 1
                examples.add(kept.rule, document.place, kept.detail, document.text)
                continue
            if contamination is not None and contamination.found_in(kept):
                removed[CONTAMINATED] += 1
                examples.add(CONTAMINATED, document.place, text=document.text)
                continue
            writer.write(kept)
            if signatures is not None:
                signatures.add(kept.text, source.deduplication != "none", source.deduplication == "all")
    if signatures is not None:
        signatures.save(folder)
    return {
        "documents": documents,
        "characters": characters,
        "with_url": with_url,
        "kept": documents - removed.total(),
        "removed": dict(removed),
        "examples": examples.found,
        "contamination": contamination.report if contamination is not None else {},
    }
