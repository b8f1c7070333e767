"""What a report finds out itself about a checkpoint: held-out measurements, and continuations of held-out texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from cola_megatron.checkpoint.find import newest_checkpoint
from cola_megatron.errors import UserError
from cola_megatron.families import family_of
from cola_megatron.reporting.continuations import Sampling, continue_held_out
from cola_megatron.reporting.report import ReconstructedText, Row, Sample
from cola_megatron.reporting.run_records import Run
from cola_megatron.reporting.text_records import original, reconstruction

Found = TypeVar("Found")
ALL = 1_000_000
"""Held-out sequences to measure on: more than there are."""


@dataclass(frozen=True)
class Observed:
    """What was found out about a checkpoint."""

    step: int = 0
    """Of the checkpoint."""
    measured: Mapping[str, float] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    samples_absent: str = ""
    sampling: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What could not be found out, and why."""
    reconstructed: list[ReconstructedText] = field(default_factory=list)
    """By a run of stage 1."""


def observe(
    run: Run,
    data: str | None,
    export: Path | None,
    samples_file: Path,
    sampling: Sampling,
    held_out_samples: int = ALL,
) -> Observed:
    """Measures the newest checkpoint of a run and generates from it, or from an export; notes what does not work.

    Args:
        data: prepared data set; None: the run's own.
        export: published folder to generate from.

    Raises:
        UserError: `data` or `export` was given and does not do.
    """
    checkpoint = newest_checkpoint(run.folder)
    if checkpoint is None and export is None:
        why = f"{run.folder} has no complete checkpoint yet"
        return Observed(samples_absent=why, notes=[f"{why}: no samples, and no measurement of this report's own"])
    folder = data or run.data
    if folder is None:
        why = "the config of this run names no data; --data says where a prepared data set lies"
        return Observed(samples_absent=why, notes=[f"no samples and no measurements: {why}"])
    notes: list[str] = []
    step = 0 if checkpoint is None else int(checkpoint.name.removeprefix("step_"))

    def measure() -> Mapping[str, float]:
        from cola_megatron.held_out.measure_checkpoint import measure_checkpoint

        return {} if checkpoint is None else measure_checkpoint(checkpoint, folder, held_out_samples)

    def generate() -> list[Sample]:
        return continue_held_out(_model(checkpoint, export), run.config, folder, samples_file, fitting)

    def reconstruct() -> list[ReconstructedText]:
        from cola_megatron.held_out.measure_checkpoint import reconstruct_with_checkpoint

        if checkpoint is None:
            return []
        texts = reconstruct_with_checkpoint(checkpoint, folder, sampling.samples)
        return [ReconstructedText(original(text), reconstruction(text, step)) for text in texts]

    fitting = sampling.fitting(run.config.data.sequence_length, _block(run))
    measured = _tried("the held-out measurement", measure, notes, insist=data is not None) or {}
    if not family_of(run.config).generates(run.config) and export is None:
        reconstructed = _tried("reconstruction", reconstruct, notes, insist=data is not None) or []
        why = "a run of stage 1 has no prior to generate from"
        return Observed(step, measured, samples_absent=why, reconstructed=reconstructed, notes=notes)
    samples = _tried("generation", generate, notes, insist=data is not None or export is not None)
    why = "" if samples is not None else notes[-1]
    return Observed(step, measured, samples or [], why, fitting.rows(run.config) if samples else [], notes)


def _block(run: Run) -> int:
    return family_of(run.config).block_tokens(run.config)


def _model(checkpoint: Path | None, export: Path | None):
    """The model of an export, else of the checkpoint."""
    from cola_megatron.interface import load_model

    folder = export or checkpoint
    assert folder is not None, "asked for where there is one"
    return load_model(folder)


def _tried(what: str, attempt: Callable[[], Found], notes: list[str], insist: bool) -> Found | None:
    """None and a note where it cannot be done, such as for a checkpoint that the run has just removed."""
    try:
        return attempt()
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        if insist:
            raise
        notes.append(f"{what} was not possible: {error}")
        return None
