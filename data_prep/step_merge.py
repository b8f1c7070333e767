"""Step `merge`: the shards of all tasks in one folder, an index per split, the manifest and the report."""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cola_megatron.data.manifest import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    FileRecord,
    Manifest,
    MixtureRecord,
    StreamRecord,
)
from data_prep.errors import DataPrepError
from data_prep.outcomes import report_of
from data_prep.pack import HELD_OUT, TRAIN
from data_prep.plan import DECIDES_NO_BYTE, Plan
from data_prep.step_tokenize import file_record, open_tokenizer
from data_prep.work import WorkFolder, write_report
from data_prep.write import INDEX_NAME, merge_indexes

__all__ = ["merge"]


def merge(plan: Plan, work: WorkFolder, task: int, folder: Path, advance: Callable[[int], None]) -> dict[str, Any]:
    """Leaves the prepared folder as training reads it; its layout is in `cola_megatron.data.shards`.

    Raises:
        DataPrepError: the train documents, all or of a source with a weight, do not fill one sequence; or a source lost
            more to one rule than the recipe allows.
    """
    reports = list(work.reports("tokenize", len(plan.inputs)))
    statistics = report_of(plan, work, reports)
    splits = {split: _streams(plan, reports, split) for split in (TRAIN, HELD_OUT)}
    if not splits[TRAIN]:
        dropped = sum(report["splits"][TRAIN]["dropped_tokens"] for report in reports)
        raise DataPrepError(
            f"the train documents of no task fill a sequence of {plan.recipe.packing.sequence_length} tokens (all "
            f"together they have {dropped}); give more text or lower sequence_length"
        )
    for source in plan.recipe.sources:
        if source.weight is not None and source.name not in splits[TRAIN]:
            raise DataPrepError(
                f"source {source.name}: has weight {source.weight:g} and nothing to train on "
                f"({_what_is_left(statistics, source.name)}), and the others would take its share; give more of it, "
                "or leave it out"
            )
    for split in splits:
        _gather(plan, work, reports, split, folder / split)
    shutil.copyfile(work.folder("tokenizer", 0) / TOKENIZER_NAME, folder / TOKENIZER_NAME)
    write_report(folder, statistics)
    manifest = _manifest(plan, work, splits, _files(reports, folder))
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return statistics


def _what_is_left(statistics: dict[str, Any], name: str) -> str:
    source = statistics["sources"][name]
    rules = ", ".join(f"{rule} {count:,}" for rule, count in source["removed"].items()) or "none"
    return f"{source['kept']['documents']:,} documents kept, removed: {rules}"


def _streams(plan: Plan, reports: list[dict[str, Any]], split: str) -> dict[str, StreamRecord]:
    """What each source gave to a split, those without a sequence left out."""
    streams: dict[str, StreamRecord] = {}
    for source in plan.recipe.sources:
        total: Counter[str] = Counter()
        for report in reports:
            if report["source"] == source.name:
                total.update(report["splits"][split])
        if total["sequences"]:
            streams[source.name] = StreamRecord(**{name: total[name] for name in StreamRecord.model_fields})
    return streams


def _gather(plan: Plan, work: WorkFolder, reports: list[dict[str, Any]], split: str, folder: Path) -> None:
    """Links the shards of a split below `folder` and writes its index."""
    folder.mkdir()
    parts = []
    for task, report in enumerate(reports):
        if not report["splits"][split]["sequences"]:
            continue
        part = f"{report['source']}/{task:05d}"
        (folder / part).mkdir(parents=True)
        for path in sorted((work.folder("tokenize", task) / split).iterdir()):
            # The index of the part is taken in and removed: it must not be the task's own file.
            (shutil.copyfile if path.name == INDEX_NAME else _link)(path, folder / part / path.name)
        parts.append(part)
    merge_indexes(folder, parts, plan.recipe.shards.format)


def _link(source: Path, target: Path) -> None:
    """A second name for the same file; a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except PermissionError:
        shutil.copyfile(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.ENOTSUP, errno.EMLINK):
            raise
        shutil.copyfile(source, target)


def _files(reports: list[dict[str, Any]], folder: Path) -> dict[str, FileRecord]:
    """Size and hash of every file below `folder`, in the order of the paths."""
    records = {}
    for task, report in enumerate(reports):
        for name, record in report["files"].items():
            split, _, shard = name.partition("/")
            records[f"{split}/{report['source']}/{task:05d}/{shard}"] = FileRecord(**record)
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    # The tasks hashed their shards; what is hashed here is small.
    return {name: records.get(name) or file_record(folder / name) for name in sorted(found)}


def _manifest(
    plan: Plan, work: WorkFolder, splits: dict[str, dict[str, StreamRecord]], files: dict[str, FileRecord]
) -> Manifest:
    recipe, tokenizer = plan.recipe, open_tokenizer(plan, work)
    return Manifest(
        layout_version=2,
        shard_format=recipe.shards.format,
        compression=recipe.shards.compression,
        sequence_length=recipe.packing.sequence_length,
        token_dtype=tokenizer.token_dtype,
        vocab_size=tokenizer.vocab_size,
        end_of_text_id=tokenizer.end_of_text_id,
        padding_id=tokenizer.padding_id,
        mixture={source.name: MixtureRecord(epochs=source.epochs, weight=source.weight) for source in recipe.sources},
        splits=splits,
        fingerprint=plan.fingerprint,
        recipe=recipe.model_dump(mode="json", exclude=DECIDES_NO_BYTE),
        versions=plan.versions,
        files=files,
    )
