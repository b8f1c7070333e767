"""What the arms of a study wrote to the same prompts at equal compute."""

from __future__ import annotations

from dataclasses import dataclass

from cola_megatron.studies.report.series import budget_steps, series_of
from cola_megatron.studies.rows import Results, Row, Sample

MOST_WRITERS, MOST_PROMPTS = 4, 5


@dataclass(frozen=True)
class Writing:
    """A prompt with the continuation of each writer."""

    prompt: str
    original: str
    continuations: tuple[tuple[str, str], ...]
    """(writer, continuation)."""


@dataclass(frozen=True)
class SideBySide:
    """Writings at one budget."""

    budget: float
    points: tuple[str, ...]
    writings: tuple[Writing, ...]
    left_out: tuple[str, ...]
    """Titles of further writers."""


def side_by_side(results: Results) -> SideBySide | None:
    """The first seed of each series at the largest budget at which most series wrote; None where none did.

    Of many settings the two with the lowest loss and the two with the highest are shown.
    """
    best: tuple[int, float, list[tuple[str, Row]]] | None = None
    titles_of = {row.point: series.title for series in series_of(results) for row in series.rows}
    order = [series.title for series in series_of(results)]
    for budget, rows in budget_steps(results, results.finished()):
        writers: dict[str, Row] = {}
        for row in rows:
            if row.samples:
                writers.setdefault(titles_of[row.point], row)
        if writers and (best is None or len(writers) >= best[0]):
            best = (len(writers), budget, [(title, writers[title]) for title in order if title in writers])
    if best is None:
        return None
    _, budget, chosen = best
    shown = chosen
    if len(chosen) > MOST_WRITERS and all(results.loss in row.measures for _, row in chosen):
        ranked = sorted(chosen, key=lambda each: each[1].measures[results.loss].value)
        shown = [*ranked[: MOST_WRITERS // 2], *ranked[-MOST_WRITERS // 2 :]]
    prompts = [sample.prompt for sample in shown[0][1].samples]
    common = [prompt for prompt in prompts if all(_of(row, prompt) for _, row in shown)]
    # Families may cut prompts of different lengths: then each stands with its own.
    asked = common or list(dict.fromkeys(sample.prompt for _, row in shown for sample in row.samples[:2]))
    writings = []
    for prompt in asked[:MOST_PROMPTS]:
        found = [(title, sample) for title, row in shown if (sample := _of(row, prompt)) is not None]
        original = found[0][1].original
        writings.append(Writing(prompt, original, tuple((title, sample.continuation) for title, sample in found)))
    titles = {title for title, _ in shown}
    return SideBySide(
        budget,
        tuple(row.point for _, row in shown),
        tuple(writings),
        tuple(title for title, _ in chosen if title not in titles),
    )


def _of(row: Row, prompt: str) -> Sample | None:
    return next((sample for sample in row.samples if sample.prompt == prompt), None)
