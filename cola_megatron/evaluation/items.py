"""The items of a task, read from local files into prompts."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cola_megatron.evaluation.dataset_files import find_files
from cola_megatron.evaluation.errors import EvaluationError
from cola_megatron.evaluation.fields import read_id, read_options, read_text, read_truths
from cola_megatron.evaluation.files import read_rows
from cola_megatron.evaluation.tasks import Task


@dataclass(frozen=True)
class Item:
    """One question as it is sent, with what would be right."""

    id: int | str
    prompt: str
    truths: tuple[str, ...]
    """Any of them is right."""
    options: tuple[str, ...] = ()

    @property
    def prompt_hash(self) -> str:
        """The beginning of the prompt's SHA-256."""
        return hashlib.sha256(self.prompt.encode(errors="surrogatepass")).hexdigest()[:16]


def read_items(data: Path, task: Task, limit: int | None = None) -> list[Item]:
    """The items of a task below the folder `data` (`find_files` says where), the first `limit` of them.

    Raises:
        EvaluationError: there are none, or one cannot be read; names the place.
    """
    files = find_files(data, task)
    items: list[Item] = []
    seen: dict[int | str, str] = {}
    for place, item in _items(files, task):
        if item.id in seen:
            raise EvaluationError(f"{place}: id {item.id} was already at {seen[item.id]}")
        seen[item.id] = place
        items.append(item)
        if len(items) == limit:
            break
    if not items:
        raise EvaluationError(f"{files[0]}: holds no items")
    return items


def _items(files: list[Path], task: Task) -> Iterator[tuple[str, Item]]:
    rows = (row for path in files for row in read_rows(path))
    for index, (place, row) in enumerate(rows):
        yield place, _sent_item(place, row) if "prompt" in row else _original_item(place, row, task, index)


def _sent_item(place: str, row: dict[str, Any]) -> Item:
    """An item whose prompt is there as it is sent."""
    return Item(read_id(place, row), read_text(place, row, "prompt"), read_truths(place, row), read_options(place, row))


def _original_item(place: str, row: dict[str, Any], task: Task, index: int) -> Item:
    """An item of the original dataset, put into the task's template."""
    dataset = task.dataset
    try:
        question = dataset.read(row)
        number = index + dataset.first_id
        item_id = number if dataset.id_column is None else row[dataset.id_column]
    except KeyError as error:
        columns = ", ".join(row)
        raise EvaluationError(
            f"{place}: no column {error.args[0]} among {columns}; is this {dataset}, or prompts?"
        ) from None
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise EvaluationError(f"{place}: not a row of {dataset}: {error}") from None
    return Item(item_id, task.template.render(question), (question.answer,), question.options)
