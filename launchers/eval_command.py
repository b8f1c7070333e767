"""`cola eval`: held-out measurements of a trained run."""

from pathlib import Path

import typer

from launchers.output import print_json, print_table


def evaluate(
    run: Path = typer.Argument(..., help="Run folder or checkpoint folder."),
    data: Path = typer.Option(None, help="Prepared folder; by default the run's own."),
    samples: int = typer.Option(256, min=1, help="Held-out sequences to measure on."),
    as_json: bool = typer.Option(False, "--json", help="JSON instead of a table."),
) -> None:
    """Reconstruction accuracy and its robustness, flow-matching loss per time bin, VAE logSNR on held-out text.

    Example: `cola eval runs/quickstart/stage2`
    """
    from cola_megatron.training.measure import measure_checkpoint

    metrics = measure_checkpoint(run, data, samples)
    if as_json:
        print_json(metrics)
    else:
        print_table([(name.replace("_", " "), f"{value:.4f}") for name, value in metrics.items()])
