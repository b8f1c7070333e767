"""`cola report`: a page about a run, at any time."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from cola_megatron.reporting.run_records import Run

SILENT_SECONDS = 3600.0
"""A run that has not written progress.json for so long is not waited for, where it has no `training.hang_seconds`."""


def report(
    run: Path = typer.Argument(..., help="Run folder of either stage; the run may still be training."),
    output: Path = typer.Option(None, help="Folder of report.html and the samples; by default the run folder."),
    stage_one: Path | None = typer.Option(
        None, help="Run folder of stage 1, if it is no longer where stage 2 found it."
    ),
    data: str | None = typer.Option(None, help="Prepared data set; by default the run's."),
    export: Path = typer.Option(None, help="Published folder to generate from; by default the newest checkpoint."),
    evaluation: Path = typer.Option(None, help="Folder that `cola eval run` wrote; its accuracies go into the table."),
    held_out_samples: int | None = typer.Option(
        None, min=2, help="Held-out sequences to measure on, spread over the split; by default all of them."
    ),
    curves_only: bool = typer.Option(
        False, "--curves-only", help="Only what the run has written: no model is loaded, measured or sampled."
    ),
    watch: float | None = typer.Option(
        None, min=1, metavar="SECONDS", help="Write the page anew so often, until the run ends."
    ),
    samples: int = typer.Option(4, min=1, help="Held-out texts that are continued."),
    prompt_tokens: int = typer.Option(48, min=1, help="Tokens of each that are given, at most half of a sequence."),
    new_tokens: int = typer.Option(48, min=1, help="Tokens that are generated."),
    guidance_scale: float = typer.Option(None, help="Cola DLM: 3, and 1 is no guidance. Others: their own default."),
) -> None:
    """Write report.html about a run: curves, cost, config, held-out measurements and continuations of held-out texts.

    What cannot be shown, such as samples of a run without a checkpoint, is named on the page and on stderr.

    Examples: `cola report runs/first/stage2 --export runs/first/export`;
    `cola report runs/second --watch 60 --held-out-samples 64`
    """
    from cola_megatron.checkpoint.find import newest_checkpoint
    from cola_megatron.reporting.continuations import Sampling
    from cola_megatron.reporting.observed import ALL, Observed, observe
    from cola_megatron.reporting.page import write_report
    from cola_megatron.reporting.run_page import report_of_run
    from cola_megatron.reporting.run_records import read_run

    options = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    folder, sampling = output or run, Sampling(samples, prompt_tokens, new_tokens, options)
    accuracies = None if evaluation is None else _accuracies(evaluation)
    observed_at: Path | None = None
    observed = Observed(samples_absent="--curves-only", notes=["no model was loaded (--curves-only)"])
    said: list[str] = []
    files = [] if export is None else [("model, published layout", str(export))]
    for turn in range(sys.maxsize):
        story = read_run(run)
        checkpoint = newest_checkpoint(run)
        if not curves_only and (turn == 0 or checkpoint != observed_at):
            file = folder / "samples" / "samples.json"
            observed = observe(story, data, export, file, sampling, held_out_samples or ALL)
            observed_at = checkpoint
        goes_on = watch is not None and not story.has_ended and not _is_silent(story)
        page = report_of_run(
            story,
            observed,
            stage_one=stage_one,
            accuracies=accuracies,
            files=files,
            refresh_seconds=watch if goes_on else None,
        )
        path = write_report(folder, page)
        for note in (each for each in page.notes if each not in said):
            print(f"cola: {note}", file=sys.stderr)
        said = page.notes
        if turn == 0 or not goes_on:
            print(path, flush=True)
        if not goes_on:
            return
        time.sleep(watch or 0)


def _is_silent(run: "Run") -> bool:
    limit = run.config.training.hang_seconds or SILENT_SECONDS
    if time.time() - run.progress.get("time", 0.0) <= limit:
        return False
    print(f"cola: {run.folder} has been silent for more than {limit:,.0f} s; not waiting any longer", file=sys.stderr)
    return True


def _accuracies(folder: Path) -> dict[str, tuple[float, float, float, int]]:
    from cola_megatron.evaluation.results import read_results

    return {
        name: (result.interval.value, result.interval.low, result.interval.high, len(result.items))
        for name, result in read_results(folder).items()
    }
