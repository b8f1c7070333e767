"""`cola report`: a page about a run of both stages."""

import json
from pathlib import Path

import typer


def report(
    run: Path = typer.Argument(..., help="Run folder of stage 2."),
    output: Path = typer.Option(None, help="Folder of report.html and the samples; by default the run folder."),
    stage_one: Path | None = typer.Option(
        None, help="Run folder of stage 1; by default the one that stage 2 started from."
    ),
    data: str | None = typer.Option(None, help="Prepared data set; by default the run's."),
    export: Path = typer.Option(None, help="Published folder to generate from; by default the newest checkpoint."),
    evaluation: Path = typer.Option(None, help="Folder that `cola eval run` wrote; its accuracies go into the table."),
    samples: int = typer.Option(4, min=1, help="Held-out texts that are continued."),
    prompt_tokens: int = typer.Option(48, min=1, help="Tokens of each that are given."),
    new_tokens: int = typer.Option(48, min=1, help="Tokens that are generated."),
    guidance_scale: float = typer.Option(3.0, help="1 is no guidance."),
) -> None:
    """Continue held-out texts, measure on the held-out split, and write report.html with the curves of both stages.

    Example: `cola report runs/first/stage2 --export runs/first/export`
    """
    from cola_megatron import ColaDLM
    from cola_megatron.checkpoint.find import require_checkpoint
    from cola_megatron.checkpoint.state_file import read_config
    from cola_megatron.config import ConfigError
    from cola_megatron.held_out.measure_checkpoint import measure_checkpoint
    from cola_megatron.records.run_folder import CONFIG, SUMMARY
    from cola_megatron.reporting.run_page import ALL, continue_held_out, summary_table, write_page

    if not (run / CONFIG).is_file() or not (run / SUMMARY).is_file():
        raise ConfigError(f"{run}: no run that has ended; give the run folder of a stage 2")
    config, folder = read_config(require_checkpoint(run)), output or run
    stage_one = stage_one or config.training.stage_one
    data = data or config.data.path
    if stage_one is None:
        raise ConfigError(f"{run}: its stage 2 did not start from a run; give --stage-one")
    if data is None:
        raise ConfigError(f"{run}: its config names no data; give --data")
    model = ColaDLM.from_published(export) if export is not None else ColaDLM.from_checkpoint(run)
    found = continue_held_out(
        model, data, folder / "samples" / "samples.json", samples, prompt_tokens, new_tokens, guidance_scale
    )
    measured = measure_checkpoint(run, data, samples=ALL)
    # A first stage that was imported has no run of its own to be counted.
    ran = [json.loads((path / SUMMARY).read_text()) for path in (stage_one, run) if (path / SUMMARY).is_file()]
    totals = {name: sum(each[name] for each in ran) for name in ("tokens", "model_flops", "seconds")}
    table = summary_table({**measured, **totals})
    if evaluation is not None:
        table += _accuracies(evaluation)
    files = [("checkpoints and metrics", f"{stage_one}, {run}"), ("token shards, tokenizer", str(data))]
    if export is not None:
        files.append(("model, published layout", str(export)))
    print(write_page(folder, f"cola_megatron: {config.name}", (stage_one, run), found, table, files))


def _accuracies(folder: Path) -> list[tuple[str, str]]:
    from cola_megatron.evaluation.results import read_results

    return [
        (
            f"accuracy, {name}",
            f"{result.interval.value:.1%} of {len(result.items):,} items "
            f"(95%: {result.interval.low:.1%} to {result.interval.high:.1%})",
        )
        for name, result in read_results(folder).items()
    ]
