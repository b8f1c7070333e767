"""Numbers of a study in words, the same in sentences, tables and figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

LOSS_TITLES = {"nats_per_token": "-log p of held-out text", "bits_per_byte": "Bits of held-out text"}
LOSS_UNITS = {"nats_per_token": "nats per token", "bits_per_byte": "bits per byte"}
"""Of a measure that is fitted as a loss."""


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits, with an exponent where it is short: 0.31, 1,640, 1.5e12; - for nothing."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if -4 <= exponent < 6:
        return f"{value:,.{max(0, digits - 1 - exponent)}f}"
    mantissa, power = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(power)}"


def count(value: float) -> str:
    """A number of parameters or tokens: 200k, 1.2M, 2B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def flops(value: float) -> str:
    """A budget with its unit."""
    return f"{number(value)} FLOPs"


def span(low: float, high: float, digits: int = 3) -> str:
    """An interval: (0.25 to 0.37)."""
    return f"({number(low, digits)} to {number(high, digits)})"


def listed(items: Sequence[str]) -> str:
    """a, b and c."""
    items = list(items)
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else "none"


def shortened(items: Sequence[str], most: int = 4) -> str:
    """The same with the end of a long list counted."""
    return listed(items) if len(items) <= most + 1 else listed([*items[:most], f"{len(items) - most} others"])


def unit(measure: str, is_loss: bool) -> str:
    """What a measure is in; scores are fractions."""
    return LOSS_UNITS.get(measure, name(measure)) if is_loss else f"fraction, {name(measure)}"


def name(measure: str) -> str:
    """A measure without underscores."""
    return measure.replace("_", " ")


def sentence(text: str) -> str:
    """With a capital at its beginning."""
    return text[:1].upper() + text[1:]
