"""Preparation of a data set: from sources to a finished folder of shards, tokenizer and manifest."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cola_megatron.data.manifest import MANIFEST_NAME, ShardError, file_problems, read_manifest
from data_prep.errors import DataPrepError
from data_prep.folders import place_folder
from data_prep.local import run_steps
from data_prep.losses import left_out_lines, summary
from data_prep.plan import DECIDES_NO_BYTE, Plan, make_plan, open_plan, work_folder_of
from data_prep.recipe import Recipe
from data_prep.steps import steps_of
from data_prep.work import REPORT_NAME, WorkFolder

__all__ = ["begin", "finish", "prepare", "said_at_the_end"]


def prepare(recipe: Recipe, workers: int = 1, progress: bool = True, force: bool = False) -> Path:
    """Reads, cleans, tokenises, splits and packs the documents of the recipe into `recipe.output`.

    The folder appears whole or not at all. The same recipe and sources make the same bytes, however often the work was
    interrupted and by however many processes it was done; where the folder already holds them, nothing is done.

    Args:
        recipe: what to prepare, and how.
        workers: processes of this machine that share the work.
        progress: show progress bars and notes on stderr.
        force: replace a folder that was prepared otherwise, or is damaged, and forget unfinished work.

    Returns:
        The absolute path of the folder.

    Raises:
        DataPrepError: a source, a setting or the output folder is at fault, or the disk is full; one line with the
            cure.
    """
    plan = make_plan(recipe)
    output = recipe.output.expanduser().absolute()
    work = begin(plan, force)
    if work is None:
        _note(f"{output}: already prepared from these sources with this recipe; nothing to do", progress)
        return output
    for line in left_out_lines(plan.left_out):
        _note(line, progress)
    with work.in_use():
        run_steps(plan, work, workers, progress)
        finish(plan, work)
    for line in said_at_the_end(output):
        _note(line, progress)
    return output


def said_at_the_end(output: Path) -> list[str]:
    """What a finished preparation says of itself, a line per source and per split."""
    manifest = read_manifest(output)
    lines = summary(json.loads((output / REPORT_NAME).read_bytes()), manifest)
    for split in manifest.splits:
        total = manifest.total(split)
        lines.append(
            f"{output / split}: {total.documents:,} documents, {total.sequences:,} sequences, {total.tokens:,} tokens "
            f"({total.padding_tokens:,} padding; {total.dropped_tokens:,} at the ends dropped)"
        )
    return lines


def begin(plan: Plan, force: bool = False) -> WorkFolder | None:
    """The work folder of a plan, with what is finished of it; None where the output is finished.

    Raises:
        DataPrepError: the output, or unfinished work beside it, is of another plan and `force` is not given; or the
            output was not made by this package, in any case.
    """
    output = plan.recipe.output.expanduser().absolute()
    work = work_folder_of(output)
    if _is_finished(output, plan, force):
        work.remove()  # of a run that was killed after its last step
        return None
    if work.path.exists():
        unfinished = _plan_of(work)
        if force or unfinished is None:
            work.refuse_if_in_use()
            work.remove()
            work.write_plan(plan.model_dump_json(indent=1))
        elif unfinished.fingerprint != plan.fingerprint:
            work.refuse_if_in_use()
            _take_over(work, unfinished, plan)
        else:
            work.write_plan(plan.model_dump_json(indent=1))  # what decides no byte may be another
    else:
        work.write_plan(plan.model_dump_json(indent=1))
    if force:
        work.allow_replacing()
    return work


def finish(plan: Plan, work: WorkFolder) -> None:
    """Puts what the last step made into its place and removes the work folder; raises DataPrepError."""
    place_folder(work.folder("merge", 0), plan.recipe.output.expanduser().absolute(), replace=work.may_replace)
    work.remove()


def _is_finished(output: Path, plan: Plan, force: bool) -> bool:
    if output.exists() and not output.is_dir():
        raise DataPrepError(f"{output}: is a file; choose another --output")
    if not output.exists() or not any(output.iterdir()):
        return False
    try:
        manifest = read_manifest(output)
    except ShardError as error:
        raise DataPrepError(f"{output}: is not empty and not a prepared folder; choose another --output") from error
    if force:
        return False
    if manifest.fingerprint != plan.fingerprint:
        difference = next(_differing(manifest.recipe, _comparable(plan.recipe)), None)
        versions = next(_differing(manifest.versions, plan.versions), None)
        raise DataPrepError(
            f"{output}: was prepared differently ({difference or versions or _written_since(output, plan)});"
            " choose another --output, or replace it with --force"
        )
    for problem in file_problems(output, manifest.files, "size"):
        raise DataPrepError(f"{problem}; prepare it again with --force")
    return True


def _written_since(output: Path, plan: Plan) -> str:
    """What tells a plan from a folder that was prepared with the same recipe and versions."""
    prepared = (output / MANIFEST_NAME).stat().st_mtime
    parts = [part for each in plan.inputs for part in each.parts]
    newer = next((part for part in parts if _modified(part.location) > prepared), None)
    if newer is None:
        return "the files of a source, or another file of the recipe, are others than then"
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(_modified(newer.location)))
    return f"{newer.location} was written at {when}, after it; if its content is as before, the folder is good as it is"


def _modified(location: str) -> float:
    try:
        return os.path.getmtime(location)
    except OSError:  # a URL
        return 0.0


def _take_over(work: WorkFolder, unfinished: Plan, plan: Plan) -> None:
    """Keeps of unfinished work what is not touched by a source that has been repaired, and writes the new plan.

    Raises:
        DataPrepError: it is the work of another recipe.
    """
    difference = next(_differing(_comparable(unfinished.recipe), _comparable(plan.recipe)), None)
    difference = difference or next(_differing(unfinished.versions, plan.versions), None)
    changed = sorted({name for name, _ in unfinished.files.items() ^ plan.files.items()})
    difference = difference or next((f"{name} has changed" for name in changed), None)
    if difference is None and len(unfinished.inputs) != len(plan.inputs):
        difference = f"{len(unfinished.inputs)} inputs there and {len(plan.inputs)} here"
    if difference is not None and work.has_finished_tasks():
        raise DataPrepError(
            f"{work.path}: holds unfinished work of another preparation ({difference}); finish that one, or start anew "
            "with --force"
        )
    if difference is not None:
        work.remove()
        work.write_plan(plan.model_dump_json(indent=1))
        return
    for step in steps_of(plan):
        for task in range(step.tasks):
            kept = unfinished.inputs[task] == plan.inputs[task] if step.reads_inputs else False
            if not (kept and step.depends_on_its_input_alone):
                work.forget(step.name, task)
    work.write_plan(plan.model_dump_json(indent=1))


def _plan_of(work: WorkFolder) -> Plan | None:
    """The plan of unfinished work; None where it cannot be read."""
    try:
        return open_plan(work)
    except DataPrepError:
        return None


def _comparable(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude=DECIDES_NO_BYTE)


def _differing(there: Any, here: Any, key: str = "") -> Iterator[str]:
    """What is not the same, one phrase each, the innermost keys named."""
    if isinstance(there, dict) and isinstance(here, dict):
        for name in sorted(there.keys() | here.keys()):
            yield from _differing(there.get(name), here.get(name), f"{key}.{name}" if key else name)
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for index, (old, new) in enumerate(zip(there, here, strict=True)):
            yield from _differing(old, new, f"{key}.{index}")
    elif there != here:
        yield f"{key} is {there} there and {here} here"


def _note(line: str, progress: bool) -> None:
    if progress:
        tqdm.write(line, file=sys.stderr)
