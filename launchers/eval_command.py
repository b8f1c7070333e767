"""`cola eval`: held-out measurements and likelihoods of a run, and benchmarks of a model or of generations."""

import re
from pathlib import Path

import typer
from typer.core import TyperGroup

from launchers import eval_benchmarks, eval_last_word, eval_likelihood
from launchers.output import print_json, print_table


class _HeldOutByDefault(TyperGroup):
    """`cola eval RUN` is `cola eval held-out RUN`."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["held-out", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_HeldOutByDefault,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Held-out measurements of a run, benchmarks of a model, verdicts on generations.\n\n"
    "`cola eval RUN` is short for `cola eval held-out RUN`.\n\n"
    "Examples: `cola eval runs/quickstart/stage2`, `cola eval score --task lambada generations.jsonl`",
)
app.command("score")(eval_benchmarks.score)
app.command("run")(eval_benchmarks.run)
app.command("table")(eval_benchmarks.table)
app.command("lm-eval")(eval_benchmarks.lm_eval)
app.command("last-word")(eval_last_word.last_word)
app.command("likelihood")(eval_likelihood.likelihood)
app.command("robustness")(eval_likelihood.robustness)


@app.command("held-out")
def held_out(
    run: Path = typer.Argument(..., help="Run folder or checkpoint folder."),
    data: str = typer.Option(None, help="Prepared folder or its URL; by default the run's own."),
    samples: int = typer.Option(256, min=1, help="Held-out sequences to measure on."),
    as_json: bool = typer.Option(False, "--json", help="JSON instead of a table."),
) -> None:
    """Reconstruction accuracy and its robustness, flow-matching loss per time bin, VAE logSNR on held-out text.

    Example: `cola eval held-out runs/quickstart/stage2`
    """
    from cola_megatron.held_out.measure_checkpoint import measure_checkpoint

    metrics = measure_checkpoint(run, data, samples)
    if as_json:
        print_json(metrics)
    else:
        print_table(_rows(metrics))


def _rows(metrics: dict[str, float]) -> list[tuple[str, str]]:
    """One line for each metric; what there is of every latent dimension stands in one line."""
    lists: dict[str, list[str]] = {}
    for name, value in metrics.items():
        of_dimension = re.fullmatch(r"(posterior_.+)_\d+", name)
        lists.setdefault(of_dimension[1] if of_dimension else name, []).append(f"{value:.4f}")
    return [(name.replace("_", " "), " ".join(values)) for name, values in lists.items()]
