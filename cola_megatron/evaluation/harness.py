"""Generate, score and record: one task, any model, as many data-parallel ranks as the job has."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from cola_megatron.evaluation.decoding import Decoding, cut_at
from cola_megatron.evaluation.items import Item
from cola_megatron.evaluation.model import EvaluationModel, sample_id
from cola_megatron.evaluation.records import (
    Record,
    append_records,
    as_stored,
    check_settings,
    drop_half_line,
    make_record,
    read_records,
    start_settings,
)
from cola_megatron.evaluation.results import TaskResult
from cola_megatron.evaluation.scoring import Rule, score
from cola_megatron.evaluation.tasks import Task
from cola_megatron.inference.noise import share_noise
from cola_megatron.parallel import ProcessGroups

logger = logging.getLogger(__name__)

T = TypeVar("T")


def evaluate_task(
    model: EvaluationModel,
    task: Task,
    items: Sequence[Item],
    output: Path,
    groups: ProcessGroups,
    batch_size: int = 20,
    progress: bool = True,
) -> TaskResult | None:
    """Evaluates a task and stores OUTPUT/TASK.json; goes on where an earlier call, on any number of ranks, ended.

    Item i belongs to data-parallel rank i % n, which appends its records to OUTPUT/TASK/records_rank_<rank>.jsonl
    as soon as it has it. Ranks of one replica compute together, and its first one writes.

    Returns:
        The result on the main process, None on the others.

    Raises:
        EvaluationError: the folder was begun with other settings or prompts.
    """
    folder = output / task.name
    described = model.describe()
    if groups.is_main and described.get("noise") == "published" and share_noise(sample_id(item.id) for item in items):
        logger.warning(
            "%s: by the published formula items whose ids lie 10,000 apart share noise: noise=hashed has none of that",
            task.name,
        )
    settings = as_stored({"task": task.name, "decoding": asdict(task.decoding), "model": described})
    if groups.is_main:
        start_settings(folder, settings)
    groups.barrier()
    check_settings(folder, settings)
    done = read_records(folder, items)
    groups.barrier()  # nobody writes before everybody has read: ranks of one replica must find the same work
    own = items[groups.data_parallel_rank :: groups.data_parallel_size]
    left = [item for item in own if item.id not in done]
    writes = groups.tensor_parallel_rank == 0 and groups.pipeline_parallel_rank == 0
    path = folder / f"records_rank_{groups.data_parallel_rank}.jsonl"
    if writes:
        drop_half_line(path)
    with tqdm(
        total=len(own),
        initial=len(own) - len(left),
        desc=task.name,
        unit="item",
        disable=not (progress and groups.is_main),
    ) as bar:
        for record in answers(model, task.rule, task.decoding, left, batch_size):
            if writes:
                append_records(path, [record])
            bar.update()
    groups.barrier()
    if not groups.is_main:
        return None
    done = read_records(folder, items)
    result = TaskResult(task.name, model.name, settings, [done[item.id] for item in items])
    result.write(output)
    return result


def answers(
    model: EvaluationModel, rule: Rule, decoding: Decoding, items: Sequence[Item], batch_size: int
) -> Iterator[Record]:
    """What a model writes to items and whether it is right, as it ends; the longest prompts begin first: what does not
    fit in memory shows at once.

    Args:
        batch_size: items under way at once.
    """
    ordered = sorted(items, key=lambda item: -len(item.prompt))
    prompts, ids = [item.prompt for item in ordered], [sample_id(item.id) for item in ordered]
    count = getattr(model, "prompt_tokens", None)
    lengths = [None] * len(prompts) if count is None else count(prompts)
    for place, text in model.generate(prompts, ids, decoding, batch_size):
        item, text = ordered[place], cut_at(text, decoding.stop)
        yield make_record(item, text, score(rule, text, item.truths, item.options), lengths[place])


def batches_by_length(values: Sequence[T], lengths: Sequence[int], size: int) -> Iterator[list[T]]:
    """Batches of about equal lengths, the longest first: what does not fit in memory shows at once."""
    order = sorted(range(len(values)), key=lambda index: -lengths[index])
    for start in range(0, len(order), size):
        yield [values[index] for index in order[start : start + size]]
