"""`cola train`: one stage of one run."""

from dataclasses import asdict

import typer

from launchers.output import print_json, print_table


def train(
    source: str = typer.Argument(..., help="A preset (tiny, small, base, paper-2b) or a YAML file."),
    overrides: list[str] = typer.Argument(None, help="section.key=value, as many as you like."),
    as_json: bool = typer.Option(False, "--json", help="Print the summary as JSON."),
) -> None:
    """Train one stage; resumes where the run folder holds a checkpoint. A signal saves and ends it with exit code 75.

    Under torchrun every process runs this same command.

    Examples: `cola train tiny stage=1 name=first data.path=data/corpus` and then
    `torchrun --nproc-per-node 8 -m cola_megatron train base name=second data.path=data/corpus
    training.stage_one=runs/first`
    """
    from cola_megatron.config import load_config
    from cola_megatron.cuda_environment import set_queues
    from cola_megatron.errors import ExitCode

    config = load_config(source, overrides or [])
    set_queues(config.parallel.tensor_parallel_size)
    from cola_megatron.records.output import outliving_its_readers
    from cola_megatron.training.loop import train as run

    summary = run(config)
    with outliving_its_readers():  # the exit code is for the scheduler, whoever reads this
        if as_json:
            print_json(asdict(summary))
        else:
            print_summary(summary)
    if summary.stopped_by_signal:
        raise typer.Exit(ExitCode.STOPPED)


def print_summary(summary) -> None:
    """The end of a run as a table."""
    rows = [
        ("steps", f"{summary.step:,}" + ("" if summary.finished else " (stopped early; run again to go on)")),
        ("tokens", f"{summary.tokens:,}"),
        ("model FLOPs", f"{summary.model_flops:.3e}"),
        ("time", f"{summary.seconds:,.0f} s"),
        *((name.replace("_", " "), f"{value:.4f}") for name, value in summary.metrics.items() if "_bin_" not in name),
        *([("measured at step", f"{summary.measured_at:,}")] if summary.measured_at not in (0, summary.step) else []),
        ("run folder", summary.run_folder),
    ]
    print_table(rows)
