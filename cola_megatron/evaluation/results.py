"""Results of a task, as JSON and as a table. Accuracies are percentages."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cola_megatron.evaluation.errors import EvaluationError
from cola_megatron.evaluation.records import Record
from cola_megatron.evaluation.statistics import Interval, mean_interval, wilson_interval
from cola_megatron.evaluation.tasks import TASKS
from cola_megatron.records.json_files import write_json


@dataclass(frozen=True)
class TaskResult:
    """A finished task: how many items were right, and every record."""

    task: str
    model: str
    """What the model was called, such as its folder."""
    settings: dict[str, Any]
    items: list[Record]

    @property
    def correct(self) -> int:
        """How many items were right."""
        return sum(record["correct"] for record in self.items)

    @property
    def interval(self) -> Interval:
        """Accuracy with its Wilson interval, in 0 .. 1."""
        return wilson_interval(self.correct, len(self.items))

    def as_json(self) -> dict[str, Any]:
        """The document that `write` stores."""
        interval = self.interval
        return {
            "task": self.task,
            "model": self.model,
            "accuracy": 100 * interval.value,
            "confidence_interval": {
                "method": "wilson",
                "level": 0.95,
                "low": 100 * interval.low,
                "high": 100 * interval.high,
            },
            "n": len(self.items),
            "correct": self.correct,
            "settings": self.settings,
            "items": self.items,
        }

    def write(self, folder: Path) -> None:
        """Stores the result as FOLDER/TASK.json."""
        write_json(folder / f"{self.task}.json", self.as_json())


def read_results(source: Path) -> dict[str, TaskResult]:
    """The results of a folder (`cola eval run --output`), or one result file, by task.

    Raises:
        EvaluationError: there is none, or a file is something else.
    """
    paths = [source / f"{name}.json" for name in TASKS] if source.is_dir() else [source]
    results = [_read_result(path) for path in paths if path.exists() or not source.is_dir()]
    if not results:
        raise EvaluationError(f"{source}: holds no results (TASK.json); `cola eval run --output` writes them")
    return {result.task: result for result in results}


def _read_result(path: Path) -> TaskResult:
    try:
        document = json.loads(path.read_text())
        result = TaskResult(*(document[name] for name in ("task", "model", "settings", "items")))
        if not all(isinstance(record["correct"], bool) for record in result.items) or not result.items:
            raise ValueError("items without verdicts")
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{path}: not a result of `cola eval run` ({error})") from None
    return result


def comparison(columns: dict[str, dict[str, TaskResult]]) -> list[list[str]]:
    """Rows of a table, headings first: a task per row, results side by side, and the mean over the tasks of each.

    A mean is only given over the tasks that all columns have.
    """
    tasks = list(dict.fromkeys(name for results in columns.values() for name in results))
    rows = [["task", *(heading for name in columns for heading in (name, "95% interval", "items"))]]
    for task in tasks:
        cells = (_cells(results[task]) if task in results else ["", "", ""] for results in columns.values())
        rows.append([task, *(cell for group in cells for cell in group)])
    shared = [task for task in tasks if all(task in results for results in columns.values())]
    if len(shared) > 1:
        means = (mean_interval([results[task].interval for task in shared]) for results in columns.values())
        name = "average" if shared == tasks else f"average of {', '.join(shared)}"
        rows.append([name, *(cell for mean in means for cell in (*percentages(mean), ""))])
    return rows


def summary(results: dict[str, TaskResult]) -> dict[str, Any]:
    """The table of one model as JSON."""
    mean = mean_interval([result.interval for result in results.values()])
    figures = ("accuracy", "confidence_interval", "n", "correct")
    return {
        "tasks": {
            task: {name: value for name, value in result.as_json().items() if name in figures}
            for task, result in results.items()
        },
        "average": {name: 100 * value for name, value in asdict(mean).items()},
    }


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _cells(result: TaskResult) -> list[str]:
    return [*percentages(result.interval), str(len(result.items))]


def percentages(interval: Interval) -> list[str]:
    return [f"{100 * interval.value:.2f}", f"{100 * interval.low:.2f} .. {100 * interval.high:.2f}"]
