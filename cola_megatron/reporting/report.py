"""What a report tells, as data: the page and the command line show the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cola_megatron.families.page import Page

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Row:
    """One number, or one fact."""

    what: str
    value: str
    meaning: str = ""
    """One line for a reader who does not know the name."""


@dataclass(frozen=True)
class Table:
    """Rows under a heading."""

    title: str
    rows: list[Row]


@dataclass(frozen=True)
class Sample:
    """One continuation of a held-out text."""

    prompt: str
    continuation: str
    truth: str
    """How the text really went on."""
    latents: torch.Tensor | None
    """(blocks, block_size, d); None for a family without."""


@dataclass(frozen=True)
class Written:
    """What the model wrote of a held-out text at a step."""

    step: int
    pieces: list[tuple[str, bool]]
    """In order; False: of wrong tokens."""
    wrong: int | None = None
    tokens: int = 0
    """Of how many; `wrong` is None for a continuation, which may differ from the truth."""


@dataclass(frozen=True)
class ReconstructedText:
    """A held-out text beside what the decoder makes of its latents."""

    original: list[tuple[str, bool]]
    """In pieces; False: where the reconstruction is wrong."""
    found: Written


@dataclass(frozen=True)
class TextOverSteps:
    """One held-out text as the model wrote it at several steps of training."""

    prompt: str | None
    """None for a reconstruction."""
    truth: list[tuple[str, bool]]
    """How it really goes on, or the text that is reconstructed."""
    written: list[Written]
    strips: list[tuple[int, list[tuple[float, str]]]] = field(default_factory=list)
    """(step, (t, text) of the first block): what is read from the estimate of its clean latents at flow time t."""


@dataclass(frozen=True)
class Stage:
    """What a stage left in metrics.jsonl."""

    records: list[dict] = field(default_factory=list)
    weights: Mapping[str, float] = field(default_factory=dict)
    """Of each term of its loss."""
    absent: str = ""
    """Why there are no records, where this run has no such stage."""


@dataclass(frozen=True)
class Report:
    """What a report tells."""

    title: str
    status: str
    """Where the run stands, in one line."""
    notes: list[str]
    """What is missing here, and why."""
    tables: list[Table]
    page: Page
    """What its family shows."""
    stage_one: Stage
    """Of a family with two; otherwise it is absent."""
    stage_two: Stage
    measured: Mapping[str, float]
    """Held-out measurement of the checkpoint; empty: none."""
    measured_at: int
    """Its step."""
    samples: list[Sample]
    samples_absent: str
    """Why there are none."""
    sampling: list[Row]
    """How the samples were made."""
    reconstructed: list[ReconstructedText]
    """By the checkpoint of a run of stage 1."""
    texts: list[TextOverSteps]
    """What the run wrote at its measurements."""
    about: list[Row]
    """Command, revision, versions."""
    config: str
    """The resolved config, as YAML."""
    files: list[tuple[str, str]]
    """Where everything lies: (what, path)."""
    refresh_seconds: float | None = None
    """A browser loads the page again after so long; None: never."""
