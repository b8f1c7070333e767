"""Steps `match`, `group` and `cluster`: the rules that look at all documents.

Documents are numbered through all parts in the order of the recipe, as they were kept by the step `clean`; of equal or
nearly equal ones the first stays. `match` is shared out by ranges of keys, `cluster` by groups of documents that keys
connect: `Plan.shares` tasks each, with the same result for any number.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.clean.settings import DeduplicationSettings
from data_prep.deduplicate import Signatures, Sketches, clusters, find_pairs, near_copies, similarity
from data_prep.errors import DataPrepError
from data_prep.kept_documents import ENDS_NAME, EXACT, EXACT_NAME, NEAR, NEAR_NAME
from data_prep.plan import Plan
from data_prep.work import WorkFolder

__all__ = ["cluster", "group", "keys_of", "match"]

ROWS_NAME = "rows_{share:03d}.bin"
"""Band, later document, first document: int64, three to a row."""


def keys_of(settings: DeduplicationSettings) -> int:
    """Number of keys that a document has: one for its whole text, one for each band of its MinHash."""
    return settings.exact + (settings.near.bands if settings.near is not None else 0)


def _settings(plan: Plan) -> DeduplicationSettings:
    settings = plan.recipe.deduplication
    assert settings is not None, "a step of recipes that have them"
    return settings


def match(plan: Plan, work: WorkFolder, task: int, folder: Path, advance: Callable[[int], None]) -> dict[str, Any]:
    """Leaves (later document, the first one with the same key), int64 (pairs, 2), of one range of one of the keys."""
    settings = _settings(plan)
    key, share = divmod(task, plan.shares)
    folders = [work.folder("clean", part) for part in range(len(plan.inputs))]
    if settings.exact and key == 0:
        keys = [Signatures.load_exact(each) for each in folders]
    else:
        keys = [Signatures.load_band(each, key - settings.exact) for each in folders]
    pairs = find_pairs(keys, share=share, shares=plan.shares)
    np.save(folder / _pairs_name(plan, share), pairs)
    return {"pairs": len(pairs)}


def group(plan: Plan, work: WorkFolder, task: int, folder: Path, advance: Callable[[int], None]) -> dict[str, Any]:
    """Leaves where the documents of each task begin, the numbers of exact copies, and the pairs of each share of the
    groups that MinHash keys connect.

    Memory: 9 bytes per document, and about 60 per pair of one range of one key.
    """
    settings = _settings(plan)
    ends = np.cumsum([0, *(report["kept"] for report in work.reports("clean", len(plan.inputs)))], dtype=np.int64)
    np.save(folder / ENDS_NAME, ends)
    exact = [_pairs(plan, work, 0, share)[:, 0] for share in range(plan.shares)] if settings.exact else []
    np.save(folder / EXACT_NAME, np.unique(np.concatenate([np.empty(0, dtype=np.int64), *exact])))
    bands = range(settings.exact, keys_of(settings))
    tables = [(band, share) for band in bands for share in range(plan.shares)]
    groups = clusters(int(ends[-1]), (_pairs(plan, work, *table) for table in tables))
    with ExitStack() as stack:
        files = [
            stack.enter_context((folder / ROWS_NAME.format(share=share)).open("wb")) for share in range(plan.shares)
        ]
        for band, share in tables:
            pairs = _pairs(plan, work, band, share)
            rows = np.column_stack([np.full(len(pairs), band), pairs]).astype("<i8")
            of_row = share_of_group(groups[pairs[:, 1]], plan.shares)
            bounds = np.searchsorted(np.sort(of_row), np.arange(plan.shares + 1))
            rows = rows[np.argsort(of_row, kind="stable")]
            for file, start, stop in zip(files, bounds, bounds[1:], strict=False):
                file.write(rows[start:stop].tobytes())
    return {"documents": int(ends[-1])}


def share_of_group(groups: np.ndarray, shares: int) -> np.ndarray:
    """Which task looks at a group, by its first document: shape as `groups`. The bits of the number are mixed."""
    mixed = groups.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(32)) % np.uint64(shares)


def cluster(plan: Plan, work: WorkFolder, task: int, folder: Path, advance: Callable[[int], None]) -> dict[str, Any]:
    """Leaves the numbers of the near copies in one share of the groups; the report counts copies by part and rule.

    The exact ones are counted by the first task.
    """
    settings = _settings(plan)
    grouped = work.folder("group", 0)
    ends = np.load(grouped / ENDS_NAME)
    exact = np.load(grouped / EXACT_NAME)
    near = np.empty(0, dtype=np.int64)
    if settings.near is not None:
        rows = np.fromfile(grouped / ROWS_NAME.format(share=task), dtype="<i8").reshape(-1, 3)
        documents, places = np.unique(rows[:, 1:], return_inverse=True)
        places = places.reshape(-1, 2)
        sketches = Sketches([work.folder("clean", part) for part in range(len(plan.inputs))])
        copies = near_copies(
            len(documents),
            [places[rows[:, 0] == band] for band in range(settings.exact, keys_of(settings))],
            np.isin(documents, exact, assume_unique=True),
            lambda one, other: similarity(sketches[int(documents[one])], sketches[int(documents[other])]),
            settings.near.similarity,
        )
        near = documents[copies]
    np.save(folder / NEAR_NAME, near)
    counts = {EXACT: _by_part(exact if task == 0 else exact[:0], ends), NEAR: _by_part(near, ends)}
    parts = np.flatnonzero(counts[EXACT] + counts[NEAR]).tolist()
    return {"dropped": {str(part): {rule: int(each[part]) for rule, each in counts.items()} for part in parts}}


def _by_part(numbers: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """How many of some ascending numbers each part has, shape (parts,)."""
    return np.diff(np.searchsorted(numbers, ends))


def _pairs_name(plan: Plan, share: int) -> str:
    return f"pairs_{share:03d}_of_{plan.shares:03d}.npy"


def _pairs(plan: Plan, work: WorkFolder, key: int, share: int) -> np.ndarray:
    path = work.folder("match", key * plan.shares + share) / _pairs_name(plan, share)
    try:
        return np.load(path)
    except FileNotFoundError as error:
        raise DataPrepError(
            f"{path} does not exist: another version began this work; remove {work.path / 'match'} and "
            f"{work.path / 'cluster'}, and run again"
        ) from error
