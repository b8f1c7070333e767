"""Fields of items and generations in JSONL, checked one by one."""

from collections.abc import Sequence
from typing import Any

from cola_megatron.evaluation.errors import EvaluationError

Row = dict[str, Any]

# The second is what the published package calls it, the third what it is called beside the published verdicts.
GENERATION_FIELDS = ("generation", "generate", "published_generation")


def read_id(place: str, row: Row) -> int | str:
    """`id`: a number or a string."""
    value = _required(place, row, "id")
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise EvaluationError(f"{place}: id must be an integer or a string, not {_kind(value)}")
    return value


def read_text(place: str, row: Row, name: str) -> str:
    """A string."""
    value = _required(place, row, name)
    if not isinstance(value, str):
        raise EvaluationError(f"{place}: {name} must be a string, not {_kind(value)}")
    return value


def read_generation(place: str, row: Row) -> str:
    """The first of `GENERATION_FIELDS` that is there; null is a model that wrote nothing."""
    name = next((name for name in GENERATION_FIELDS if name in row), GENERATION_FIELDS[0])
    return "" if name in row and row[name] is None else read_text(place, row, name)


def read_truths(place: str, row: Row) -> tuple[str, ...]:
    """`ground_truth`: a text, or a list of texts of which any is right; numbers count as their digits."""
    value = _required(place, row, "ground_truth")
    values = value if isinstance(value, list) else [value]
    if not values:
        raise EvaluationError(f"{place}: ground_truth is an empty list")
    return _texts(place, "ground_truth", values)


def read_options(place: str, row: Row) -> tuple[str, ...]:
    """`choices`: absent or null, a list, an object with keys A, B, ..., or the hub's `{"text": [...], "label": [...]}`.

    Raises:
        EvaluationError: they are anything else.
    """
    value = row.get("choices")
    if value is None:
        return ()
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        value = value["text"]
    elif isinstance(value, dict):
        letters = {key.strip("() .").upper(): option for key, option in value.items()}
        value = [letters.get(chr(ord("A") + position)) for position in range(len(letters))]
    if not isinstance(value, list):
        raise EvaluationError(f"{place}: choices must be a list or an object with keys A, B, ..., not {_kind(value)}")
    return _texts(place, "choices", value)


def _texts(place: str, name: str, values: Sequence[Any]) -> tuple[str, ...]:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise EvaluationError(f"{place}: {name} must hold texts, not {_kind(value)}")
    return tuple(str(value) for value in values)


def _required(place: str, row: Row, name: str) -> Any:
    if name not in row:
        raise EvaluationError(f"{place}: no field {name} (there are {', '.join(row) or 'none'})")
    return row[name]


def _kind(value: Any) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", bool: "true or false", float: "a number"}
    return names.get(type(value), type(value).__name__)
