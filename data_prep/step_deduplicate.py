"""Steps `match` and `cluster`: the rules that look at all documents.

Documents are numbered through all parts in the order of the recipe, as they were kept by the step `clean`; of equal or
nearly equal ones the first stays.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.clean.settings import DeduplicationSettings
from data_prep.deduplicate import Signatures, Sketches, find_pairs, near_copies, similarity
from data_prep.kept_documents import DROPPED_NAME, EXACT, EXACT_NAME, NEAR
from data_prep.plan import Plan
from data_prep.work import WorkFolder

__all__ = ["cluster", "keys_of", "match"]

PAIRS_NAME = "pairs.npy"


def keys_of(settings: DeduplicationSettings) -> int:
    """Number of keys that a document has: one for its whole text, one for each band of its MinHash."""
    return settings.exact + (settings.near.bands if settings.near is not None else 0)


def _settings(plan: Plan) -> DeduplicationSettings:
    settings = plan.recipe.deduplication
    assert settings is not None, "a step of recipes that have them"
    return settings


def match(plan: Plan, work: WorkFolder, task: int, folder: Path, advance: Callable[[int], None]) -> dict[str, Any]:
    """Leaves (later document, the first one with the same key number `task`), int64 (pairs, 2)."""
    settings = _settings(plan)
    folders = [work.folder("clean", part) for part in range(len(plan.inputs))]
    if settings.exact and task == 0:
        keys = [Signatures.load_exact(each) for each in folders]
    else:
        keys = [Signatures.load_band(each, task - settings.exact) for each in folders]
    pairs = find_pairs(keys)
    np.save(folder / PAIRS_NAME, pairs)
    return {"pairs": len(pairs)}


def cluster(plan: Plan, work: WorkFolder, task: int, folder: Path, advance: Callable[[int], None]) -> dict[str, Any]:
    """Leaves, for every part, which of its kept documents are dropped; the report counts them by part and rule."""
    settings = _settings(plan)
    counts = [report["kept"] for report in work.reports("clean", len(plan.inputs))]
    exact = np.zeros(sum(counts), dtype=bool)
    if settings.exact:
        exact[_pairs(work, 0)[:, 0]] = True
    near = np.zeros_like(exact)
    if settings.near is not None:
        sketches = Sketches([work.folder("clean", part) for part in range(len(plan.inputs))])
        near = near_copies(
            len(exact),
            (_pairs(work, key) for key in range(settings.exact, keys_of(settings))),
            exact,
            lambda one, other: similarity(sketches[one], sketches[other]),
            settings.near.similarity,
        )
    rules: dict[str, dict[str, int]] = {}
    start = 0
    for part, count in enumerate(counts):
        own = slice(start, start + count)
        np.save(folder / DROPPED_NAME.format(task=part), np.flatnonzero(exact[own] | near[own]))
        np.save(folder / EXACT_NAME.format(task=part), np.flatnonzero(exact[own]))
        rules[str(part)] = {EXACT: int(exact[own].sum()), NEAR: int(near[own].sum())}
        start += count
    return {"documents": start, "dropped": rules}


def _pairs(work: WorkFolder, key: int) -> np.ndarray:
    return np.load(work.folder("match", key) / PAIRS_NAME)
