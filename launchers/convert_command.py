"""`cola convert`: to and from the layouts of other programs, into other files, and whether nothing was lost."""

import re
from enum import StrEnum
from pathlib import Path

import typer

from launchers.convert_verdict import as_plain, summary
from launchers.generation_options import EMA
from launchers.output import fail, print_json, print_table

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

app = typer.Typer(
    help="Checkpoints to and from the layout of other programs, which the model's family says: Cola DLM's published "
    "inference layout, Hugging Face LLaMA, LLaDA; checkpoints in other files.",
    epilog="Example: cola convert export runs/my-run exports/my-model",
    no_args_is_help=True,
)


class Precision(StrEnum):
    """Type of exported weights."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


@app.command("export")
def export(
    run: Path = typer.Argument(..., help="Run folder (its newest checkpoint) or a checkpoint folder."),
    output: Path = typer.Argument(
        ..., help="Folder to write: weights, config.json and tokenizer.json; of Cola DLM cola_dit/ and cola_vae/."
    ),
    precision: Precision = typer.Option(
        Precision.auto, help="Type of the written weights; auto: as an imported checkpoint was read, else fp32."
    ),
    max_shard_size: str = typer.Option(
        "5GB", help="Larger networks are cut into files of at most this size: a number with KB, MB, GB, KiB, MiB, GiB."
    ),
    ema: bool = EMA,
) -> None:
    """Write a checkpoint in the layout of its family: published Cola DLM, Hugging Face LLaMA, LLaDA; Plaid has none.

    Example: `cola convert export runs/second exports/second`

    Example: `cola convert export runs/second exports/second --precision bf16 --max-shard-size 2GB`
    """
    import torch

    from cola_megatron.conversion.export_checkpoint import export_checkpoint

    dtypes = {Precision.auto: None, Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}
    model = export_checkpoint(run, output, dtypes[precision], _bytes(max_shard_size), ema=ema)
    if model.tokenizer is None:
        typer.echo("no tokenizer.json is known for this checkpoint: the export has none", err=True)
    print(output)


@app.command("import")
def import_(
    published: Path = typer.Argument(..., help="Folder in one of these layouts; which one is found out."),
    output: Path = typer.Argument(..., help="Checkpoint folder to write: readable like a run folder."),
    source: str = typer.Option(
        None, "--config", help="Preset or YAML file for all but the model section; by default `paper-2b` of the family."
    ),
    overrides: list[str] = typer.Argument(None, help="section.key=value for that config."),
) -> None:
    """Turn published weights into a checkpoint that `cola generate`, `cola eval` and stage 2 read, under any layout.

    Example: `cola convert import exports/second runs/imported --config small`
    """
    from cola_megatron.conversion.import_weights import import_weights

    model = import_weights(published, output, source, overrides or [])
    if not any(name.startswith("dit.") for name in model.shapes) and model.config.family == "cola":
        typer.echo(f"{published} has no cola_dit: this is a checkpoint of the VAE alone", err=True)
    print(output)


@app.command("verify")
def verify(
    first: Path = typer.Argument(..., help="Published folder, run folder or checkpoint folder."),
    second: Path = typer.Argument(..., help="Another."),
    tolerance: float = typer.Option(
        None, min=0.0, help="Relative difference of tensors and outputs to accept; by default every bit counts."
    ),
    forward: bool = typer.Option(
        True, help="Also compare encode, decode and velocity, for which each model is built in memory."
    ),
    as_json: bool = typer.Option(False, "--json", help="JSON instead of a table."),
) -> None:
    """Compare two models: configs, tokenizers, tensors, outputs. Exit code 0: equal, 1: different, 2: wrong use.

    Example: `cola convert verify runs/second exports/second`

    Example: `cola convert verify exports/second exports/second-bf16 --tolerance 0.02`
    """
    from cola_megatron.compare_models import compare_models
    from cola_megatron.errors import UserError

    try:
        found = compare_models(first, second, forward)
    except UserError as error:
        raise typer.Exit(fail(str(error), 2)) from None
    equal = found.equal(tolerance)
    if as_json:
        print_json({"equal": equal, "tolerance": tolerance, **as_plain(found)})
    else:
        print_table([*summary(found), ("verdict", "equal" if equal else "different")])
    raise typer.Exit(0 if equal else 1)


@app.command("reshard")
def reshard_(
    checkpoint: Path = typer.Argument(..., help="Run folder (its newest checkpoint) or a checkpoint folder."),
    output: Path = typer.Argument(..., help="Checkpoint folder to write."),
    ranks: int = typer.Option(..., min=1, help="Processes of the job that will read it: one set of files for each."),
) -> None:
    """Rewrite a checkpoint into as many even parts as the next job has processes.

    No job needs it: any layout resumes from any checkpoint. It saves reading: a checkpoint of a thousand processes is
    in as many small files, and a process of a smaller job, an export or a copy has to open them all.

    Example: `cola convert reshard runs/second runs/moved/checkpoints/step_00250000 --ranks 8`
    """
    from cola_megatron.checkpoint.reshard import reshard

    print(reshard(checkpoint, output, ranks))


def _bytes(size: str) -> int:
    from cola_megatron.config import ConfigError

    matched = re.fullmatch(r"(\d+)([A-Za-z]+)", size)
    if matched is None or matched[2] not in UNITS or int(matched[1]) == 0:
        raise ConfigError(f"--max-shard-size={size} must be a positive number with a unit: one of {', '.join(UNITS)}")
    return int(matched[1]) * UNITS[matched[2]]
