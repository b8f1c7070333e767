"""The page about a run, made of what its folder says and of what was found out about its checkpoint."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Mapping
from pathlib import Path

from cola_megatron.config import dump_config
from cola_megatron.families import family_of
from cola_megatron.reporting.observed import Observed
from cola_megatron.reporting.report import Report, Row, Stage, Table
from cola_megatron.reporting.run_records import Run, stage_one_of
from cola_megatron.reporting.tables import accuracy_rows, cost_table, heading, held_out_rows, model_rows, prior_rows
from cola_megatron.reporting.text_records import texts_over_steps


def report_of_run(
    run: Run,
    observed: Observed,
    title: str | None = None,
    stage_one: Path | None = None,
    accuracies: Mapping[str, tuple[float, float, float, int]] | None = None,
    files: list[tuple[str, str]] | None = None,
    refresh_seconds: float | None = None,
) -> Report:
    """All that there is to tell of a run.

    Args:
        stage_one: where the run's stage 1 is now, if not where its config says.
        accuracies: of each benchmark task accuracy, the ends of its 95% interval, and the number of items.
        files: what else lies where.

    Raises:
        UserError: `stage_one` is not the stage 1 of this run.
    """
    first, at_step, why_not = stage_one_of(run, stage_one)
    own = Stage(run.records, family_of(run.config).loss_weights(run.config))
    if family_of(run.config).stage_of(run.config) == 1:
        stages = own, Stage(absent=why_not)
    else:
        before = (
            Stage(absent=why_not)
            if first is None
            else Stage(first.records, family_of(first.config).loss_weights(first.config))
        )
        stages = before, own
    tables = [
        *_held_out_tables(run, observed),
        *([Table("Benchmarks", accuracy_rows(accuracies))] if accuracies else []),
        cost_table(run, None if first is None else (first, at_step)),
        Table("Model", model_rows(run.config)),
    ]
    places = [("run", str(run.folder)), *([("run of stage 1", str(first.folder))] if first else [])]
    if run.data is not None:
        places.append(("data", run.data))
    no_stage_one = (
        [f"No curves and no cost of a stage 1: {why_not}."]
        if why_not and family_of(run.config).stage_of(run.config) == 2
        else []
    )
    notes = [*run.notes, *(first.notes if first else []), *observed.notes]
    return Report(
        title=title or f"cola_megatron: {run.config.name}",
        status=status_of(run),
        notes=[*no_stage_one, *(f"{note[0].upper()}{note[1:]}." for note in notes)],
        tables=tables,
        page=family_of(run.config).page,
        stage_one=stages[0],
        stage_two=stages[1],
        measured=observed.measured,
        measured_at=observed.step,
        samples=observed.samples,
        samples_absent=observed.samples_absent,
        sampling=observed.sampling,
        reconstructed=observed.reconstructed,
        texts=texts_over_steps(run.texts),
        about=_about(run),
        config=dump_config(run.config),
        files=[*places, *(files or [])],
        refresh_seconds=refresh_seconds,
    )


def status_of(run: Run) -> str:
    """Where a run stands, in one line."""
    progress, steps, what = run.progress, run.config.training.steps, heading(run.config)
    at = f"step {run.step:,} of {steps:,}"
    if not progress:
        return f"{what}, {at}; progress.json is missing, so whether the run goes on is not known."
    if run.has_ended:
        return f"{what}, {run.state} at {at}."
    line = f"{what}, in progress ({run.state}): {at}"
    if isinstance(progress.get("time"), int | float):
        alive = datetime.datetime.fromtimestamp(progress["time"], datetime.UTC)
        line += f"; last sign of life {alive:%Y-%m-%d %H:%M:%S} UTC"
    seconds = progress.get("seconds_per_step")
    if isinstance(seconds, int | float):
        line += f"; about {datetime.timedelta(seconds=round(seconds * max(0, steps - run.step)))} of steps to go"
    return f"{line}."


def _held_out_tables(run: Run, observed: Observed) -> list[Table]:
    """What this report measured itself, else the last measurement of the run."""
    metrics, step, by = observed.measured, observed.step, "by this report"
    if not metrics:
        own = [record for record in run.records if record["kind"] == "evaluation"]
        if not own:
            return [Table("Held-out", [Row("held-out measurements", "none yet", "the run has recorded none so far")])]
        metrics, step, by = own[-1], own[-1]["step"], "by the run"
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    tables = [Table(f"Held-out, measured at step {step:,} {by}", held_out_rows(numbers, run.config))]
    if rows := prior_rows(numbers):
        tables.append(Table(f"The prior, at step {step:,}", rows))
    return tables


def _about(run: Run) -> list[Row]:
    """What manifest.json says of the first start of a run."""
    manifest = run.manifest
    if not manifest:
        return [Row("provenance", "not recorded", "there is no manifest.json that can be read")]
    command, versions, changes = (manifest.get(name) for name in ("command", "versions", "git_changes"))
    rows = [
        Row(
            "command",
            shlex.join(map(str, command)) if isinstance(command, list) else str(command),
            "of the first start",
        ),
        Row("host", str(manifest.get("host")), "of the main process"),
        Row("git revision", str(manifest.get("git_revision") or "not known"), "of the checkout that ran"),
        Row(
            "uncommitted changes",
            "none" if changes == "" else str(changes or "not known"),
            "files that differed from it",
        ),
        Row("starts", f"{1 + len(manifest.get('resumed', []))}", "the first, and each time the run was resumed"),
    ]
    if isinstance(versions, dict):
        rows.append(
            Row("versions", ", ".join(f"{name} {version}" for name, version in versions.items()), "at the first start")
        )
    return rows
