"""Scoring of generations that exist already."""

from pathlib import Path
from typing import Any

from cola_megatron.evaluation.errors import EvaluationError
from cola_megatron.evaluation.fields import read_generation, read_id, read_options, read_truths
from cola_megatron.evaluation.files import read_jsonl
from cola_megatron.evaluation.scoring import score
from cola_megatron.evaluation.tasks import Task


def score_file(task: Task, path: Path) -> list[dict[str, Any]]:
    """Verdicts on a JSONL file of `id`, `generation`, `ground_truth` and `choices`: [{"id", "correct"}, ...].

    Raises:
        EvaluationError: a line cannot be read, or there is none.
    """
    verdicts = []
    for place, row in read_jsonl(path):
        verdict = score(task.rule, read_generation(place, row), read_truths(place, row), read_options(place, row))
        verdicts.append({"id": read_id(place, row), "correct": verdict.correct})
    if not verdicts:
        raise EvaluationError(f"{path}: holds no generations")
    return verdicts
