"""What a run wrote of held-out texts at its measurements, as a page shows it: each text over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cola_megatron.reporting.report import TextOverSteps, Written

SHOWN = 6
"""Steps of a text that a page shows: the first, the last, and as evenly as it goes in between."""


def texts_over_steps(records: Sequence[dict[str, Any]]) -> list[TextOverSteps]:
    """Each text of the last record, as it was written then and before."""
    if not records:
        return []
    chosen = sorted({round(place * (len(records) - 1) / (SHOWN - 1)) for place in range(SHOWN)})
    records = [records[place] for place in chosen]
    return [_over_steps(records, place) for place in range(len(records[-1]["texts"]))]


def reconstruction(text: dict[str, Any], step: int) -> Written:
    """One reconstructed text of a record."""
    return Written(
        step, [(piece, bool(right)) for piece, right in text["reconstruction"]], text["wrong"], text["tokens"]
    )


def original(text: dict[str, Any]) -> list[tuple[str, bool]]:
    """What a reconstruction should have been; False: where it is wrong."""
    return [(piece, bool(right)) for piece, right in text["original"]]


def _over_steps(records: Sequence[dict[str, Any]], place: int) -> TextOverSteps:
    # The number of texts is a free setting: earlier records may have fewer.
    having = [(record["step"], record["texts"][place]) for record in records if place < len(record["texts"])]
    last = having[-1][1]
    if "original" in last:
        whole = [("".join(piece for piece, _ in last["original"]), True)]
        return TextOverSteps(None, whole, [reconstruction(text, step) for step, text in having])
    return TextOverSteps(
        last["prompt"],
        [(last["truth"], True)],
        [Written(step, [(text["continuation"], True)]) for step, text in having],
        [(step, [(float(each["t"]), each["text"]) for each in text["strip"]]) for step, text in having],
    )
