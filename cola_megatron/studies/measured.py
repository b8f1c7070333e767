"""What is measured of a point: the commands that do it, the files that they leave, and the figures in those."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cola_megatron.errors import UserError
from cola_megatron.evaluation.last_word_results import LastWords
from cola_megatron.evaluation.records import Record
from cola_megatron.evaluation.results import TaskResult, read_results
from cola_megatron.evaluation.statistics import clustered_standard_error, mean_interval
from cola_megatron.evaluation.tasks import tasks_named
from cola_megatron.records.json_files import read_object
from cola_megatron.studies.study_file import PROMPT_LENGTH, MeasuresConfig, Overrides

LIKELIHOOD, LAST_WORD, TASKS = "likelihood.json", "last_word.json", "tasks"
Measure = dict[str, Any]
"""{"value": ..., "error": standard error or None, ...}"""


class _NoItems(Exception):
    """A file of measurements does not have the items that are asked for; one line, without its name."""


def asked(measures: MeasuresConfig, generation: Overrides, likelihood: Overrides) -> dict[str, dict[str, Any]]:
    """The files of a point that is measured, relative to its folder, and what each is measured with.

    Raises:
        ConfigError: an unknown task.
    """
    found: dict[str, dict[str, Any]] = {}
    if measures.likelihood_texts:
        found[LIKELIHOOD] = {"texts": measures.likelihood_texts, **likelihood}
    if measures.last_word_items:
        found[LAST_WORD] = {"items": measures.last_word_items, **generation}
    return found | {f"{TASKS}/{task}.json": {"items": measures.items, **generation} for task in task_names(measures)}


def wanted(measures: MeasuresConfig) -> list[str]:
    """The files of a point that is measured, relative to its folder; raises ConfigError for an unknown task."""
    return list(asked(measures, {}, {}))


def missing(measures: MeasuresConfig, output: Path) -> list[str]:
    """Those that are not there; raises ConfigError as well."""
    return [name for name in wanted(measures) if not (output / name).is_file()]


def commands(
    measures: MeasuresConfig, generation: Overrides, likelihood: Overrides, checkpoint: Path, output: Path, data: str
) -> list[list[str]]:
    """The words after `cola` that measure a checkpoint, without those whose files are there.

    Args:
        data: of the study, which may have been moved since the checkpoint was written.
    """
    left, found = missing(measures, output), []
    if LIKELIHOOD in left:
        words = ["eval", "likelihood", str(checkpoint), "--data", data, "--limit", str(measures.likelihood_texts)]
        found.append([*words, *_settings(likelihood), "--output", str(output / LIKELIHOOD)])
    if LAST_WORD in left:
        words = ["eval", "last-word", str(checkpoint), "--data", data, "--limit", str(measures.last_word_items)]
        found.append([*words, *_settings(generation), "--output", str(output / LAST_WORD)])
    tasks = [task for task in task_names(measures) if f"{TASKS}/{task}.json" in left]
    if tasks:
        limit = [] if measures.items is None else ["--limit", str(measures.items)]
        words = ["eval", "run", str(checkpoint), "--tasks", ",".join(tasks), "--data", str(measures.benchmarks)]
        found.append([*words, *limit, *_settings(generation), "--output", str(output / TASKS)])
    return found


def _settings(given: Mapping[str, Any]) -> list[str]:
    return [word for name, value in given.items() for word in ("--set", f"{name}={json.dumps(value)}")]


def task_names(measures: MeasuresConfig) -> list[str]:
    """The published tasks that are asked; raises ConfigError for one that is unknown."""
    return [task.name for task in tasks_named(",".join(measures.tasks))] if measures.tasks else []


def measures_in(output: Path, items: Overrides | None = None) -> Mapping[str, Measure]:
    """The figures in the files of a point.

    Args:
        items: which of the items count; of a part of them there are scores alone, as a likelihood has no items.

    Raises:
        UserError: a file is something else, or damaged, or has no such items.
    """
    found: dict[str, Measure] = {}
    last_word = partial(_last_word_of, items=items) if items else _last_word
    readers = {LAST_WORD: last_word} if items else {LIKELIHOOD: _likelihood, LAST_WORD: last_word}
    for name, read in readers.items():
        if not (output / name).is_file():
            continue
        try:
            found |= read(read_object(output / name))
        except (KeyError, TypeError):
            raise UserError(
                f"{output / name}: not what this version writes; remove it, and `cola sweep resume` measures again"
            ) from None
        except _NoItems as error:
            raise UserError(f"{output / name}: {error}") from None
    if (output / TASKS).is_dir() and any((output / TASKS).glob("*.json")):
        found |= _tasks(output / TASKS, items)
    return found


def _likelihood(document: Mapping[str, Any]) -> dict[str, Measure]:
    figure = document["nats_per_token"]
    texts = {"texts": document["texts"], "draw_error": figure["draw_error"]}
    own = {"value": figure["value"], "error": figure["standard_error"], "kind": figure["kind"], **texts}
    counted = document.get("baselines", {})
    return {
        "nats_per_token": own,
        **{f"nats_per_token_{name}": {"value": nats, "error": None} for name, nats in counted.items()},
    }


def _last_word(document: Mapping[str, Any]) -> dict[str, Measure]:
    """The model's, and what counting would have got right."""
    shares = {"last_word": document["accuracy"]}
    shares |= {f"last_word_{name}": figure for name, figure in document["baselines"].items()}
    items = document["n"]
    return {
        name: {"value": figure["value"], "error": figure["standard_error"], "items": items}
        for name, figure in shares.items()
    }


def _last_word_of(document: Mapping[str, Any], items: Overrides) -> dict[str, Measure]:
    """The model's on a part of the items; what counting gets right is of all of them."""
    part = LastWords("", "", {}, _chosen(document["items"], items))
    return {"last_word": _last_word(part.as_json())["last_word"]}


def _chosen(records: Sequence[Record], items: Overrides) -> list[Record]:
    """The records of the items that count; raises _NoItems."""
    parity = items[PROMPT_LENGTH]
    if any("prompt_tokens" not in record for record in records):
        raise _NoItems(
            "does not say how long its prompts were, as it is of an earlier version; remove it (with the folder of its "
            "name, where there is one), and `cola sweep resume` measures again"
        )
    found = [record for record in records if record["prompt_tokens"] % 2 == (parity == "odd")]
    if not found:
        raise _NoItems(f"none of its {len(records)} items has a prompt of {parity} length: measure more of them")
    return found


def _tasks(folder: Path, items: Overrides | None) -> dict[str, Measure]:
    results = read_results(folder)
    if items:
        results = {task: _part_of(result, items, folder) for task, result in results.items()}
    found: dict[str, Measure] = {
        task: {"value": result.interval.value, "error": _error(result), "items": len(result.items)}
        for task, result in results.items()
    }
    mean = mean_interval([result.interval for result in results.values()])
    error = sum((each["error"] or 0.0) ** 2 for each in found.values()) ** 0.5 / len(found)
    return {**found, "task_average": {"value": mean.value, "error": error, "tasks": len(results)}}


def _part_of(result: TaskResult, items: Overrides, folder: Path) -> TaskResult:
    try:
        return replace(result, items=_chosen(result.items, items))
    except _NoItems as error:
        raise UserError(f"{folder / result.task}.json: {error}") from None


def _error(result: TaskResult) -> float:
    """Over its items; not 0 where none was right."""
    correct = [int(record["correct"]) for record in result.items]
    return clustered_standard_error(correct, [1] * len(correct))
