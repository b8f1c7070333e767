"""`cola convert`: to and from the published inference layout, and into other files."""

from enum import StrEnum
from pathlib import Path

import typer

app = typer.Typer(
    help="Checkpoints to and from the published inference layout; checkpoints in other files.", no_args_is_help=True
)


class Precision(StrEnum):
    """Type of exported weights."""

    fp32 = "fp32"
    bf16 = "bf16"


@app.command("export")
def export(
    run: Path = typer.Argument(..., help="Run folder (its newest checkpoint) or a checkpoint folder."),
    output: Path = typer.Argument(..., help="Folder to write: cola_dit/, cola_vae/, tokenizer.json."),
    precision: Precision = typer.Option(Precision.fp32, help="Type of the written weights."),
) -> None:
    """Write a checkpoint in the published layout.

    Example: `cola convert export runs/second exports/second`
    """
    import torch

    from cola_megatron import ColaDLM

    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    ColaDLM.from_checkpoint(run, device="cpu").save_published(output, dtype)
    print(output)


@app.command("import")
def import_(
    published: Path = typer.Argument(..., help="Folder in the published layout."),
    output: Path = typer.Argument(..., help="Checkpoint folder to write: readable like a run folder."),
    source: str = typer.Option("paper-2b", "--config", help="Preset or YAML file for all but the model section."),
    overrides: list[str] = typer.Argument(None, help="section.key=value for that config."),
) -> None:
    """Turn published weights into a checkpoint that `cola generate`, `cola eval` and stage 2 read.

    Example: `cola convert import exports/second runs/imported --config small`
    """
    from cola_megatron.training.imported import import_published

    print(import_published(published, output, source, overrides or []))


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
    from cola_megatron.training.reshard import reshard

    print(reshard(checkpoint, output, ranks))
