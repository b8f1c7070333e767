"""What `cola convert verify` says."""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cola_megatron.compare_models import Comparison, Distance, Unequal

SHOWN = 5
"""Of each kind of difference so many are listed; --json has all."""

Row = tuple[str, str]


def as_plain(found: "Comparison") -> dict[str, Any]:
    """All that was found, for JSON."""
    plain = {}
    for field in fields(found):
        value = getattr(found, field.name)
        plain[field.name] = (
            [each._asdict() if hasattr(each, "_asdict") else each for each in value]
            if isinstance(value, list)
            else value
        )
    return plain


def summary(found: "Comparison") -> Iterator[Row]:
    """Rows of a table: one for each kind of thing compared, and below it what differs."""
    yield "configs", "different" if found.configs else "equal"
    yield from _shortened([_values(each) for each in found.configs])
    if found.remarks:
        yield "form", "stored or described in another way"
        yield from _shortened([_values(each) for each in found.remarks])
    yield "tokenizer.json", found.tokenizer
    identical = found.tensors - len(found.shapes) - len(found.distances)
    yield "tensors", f"{identical} of {found.tensors} equal bit for bit"
    yield from _shortened([(name, "only in the first") for name in found.only_first])
    yield from _shortened([(name, "only in the second") for name in found.only_second])
    yield from _shortened([_values(each) for each in found.shapes])
    yield from _shortened([(each.name, _distance(each)) for each in found.distances])
    if not found.outputs:
        yield "forward pass", "not compared"
    for each in found.outputs:
        yield f"forward pass: {each.name}", "equal" if each.absolute == 0 else _distance(each)


def _values(each: "Unequal") -> Row:
    return each.name, f"{each.first} in the first, {each.second} in the second"


def _distance(each: "Distance") -> str:
    return f"differs by at most {each.absolute:.3g} ({each.relative:.3g} of the largest magnitude)"


def _shortened(rows: Sequence[Row]) -> Iterator[Row]:
    for name, value in rows[:SHOWN]:
        yield f"  {name}", value
    if len(rows) > SHOWN:
        yield f"  and {len(rows) - SHOWN} more", ""
