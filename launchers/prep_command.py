"""`cola prep`: raw text to token shards, and their verification."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from launchers.output import fail, print_json

if TYPE_CHECKING:
    from launchers.slurm.site import Site

app = typer.Typer(
    help="Turn raw corpora into sharded token data sets, and check them.",
    epilog="Example: cola prep run data_prep/recipes/embedded.yaml",
    no_args_is_help=True,
)

WORK = typer.Argument(..., help="Work folder of a preparation: NAME.work, beside its output.")


@app.command("run")
def run(
    inputs: list[str] = typer.Argument(
        None, help="Files, globs, folders or URLs, or `embedded` for the Python documentation. Or give --recipe."
    ),
    output: Path = typer.Option(None, help="Folder to write."),
    recipe: Path = typer.Option(
        None, help="YAML file with sources, cleaning, packing, or `embedded`; INPUTS are then overrides a.b=c."
    ),
    sequence_length: int = typer.Option(512, help="Tokens per sequence."),
    tokenizer: Path = typer.Option(None, help="A tokenizer.json; without it a byte-level BPE is trained."),
    vocab_size: int = typer.Option(4096, help="Vocabulary of a trained tokenizer."),
    end_of_text: str = typer.Option("<|endoftext|>", help="Token that ends every document."),
    padding: str = typer.Option("<|pad|>", help="Token that fills a sequence."),
    held_out_fraction: float = typer.Option(0.02, help="Share of documents that are held out, by hash of the text."),
    text_field: str = typer.Option("text", help="Field or column that holds the text."),
    input_format: str = typer.Option(
        "auto", "--format", help="How files are read whose names do not say it: text, jsonl, parquet, csv, warc, ..."
    ),
    bad_documents: str = typer.Option("error", help="What a damaged record does: error ends the run, skip counts it."),
    max_tokens: int = typer.Option(None, help="Cap on the tokens."),
    most_removed: float = typer.Option(0.5, help="Stop where one rule removes a larger share of the documents."),
    shard_format: str = typer.Option("mds", help="mds (mosaicml-streaming) or webdataset."),
    task_bytes: int = typer.Option(2**28, help="About how much of a source one task reads; less takes less memory."),
    workers: int = typer.Option(None, min=1, help="Processes; by default one per core."),
    force: bool = typer.Option(False, help="Replace a data set made with other settings, and forget unfinished work."),
    dry_run: bool = typer.Option(False, help="Show sources, parts and steps; write nothing."),
) -> None:
    """Prepare a data set; what is finished is not done again, after a kill as after success.

    Examples: `cola prep run embedded --output data/embedded --vocab-size 2048 --sequence-length 128`;
    `cola prep run --recipe web.yaml --workers 16`
    """
    from launchers.prep_recipes import describe, from_file, from_options, refuse_nothing_held_out

    if recipe is not None:
        wanted = from_file(recipe, inputs or [], output)
    elif not inputs or output is None:
        raise typer.BadParameter("give INPUTS and --output, or --recipe FILE")
    else:
        wanted = from_options(
            inputs,
            output,
            source={
                "text_field": text_field,
                "format": input_format,
                "bad_documents": bad_documents,
                "max_tokens": max_tokens,
            },
            tokenizer={
                "path": tokenizer,
                "vocab_size": vocab_size,
                "end_of_text": end_of_text,
                "padding": padding,
            },
            packing={"sequence_length": sequence_length},
            shards={"format": shard_format},
            held_out_fraction=held_out_fraction,
            most_removed=most_removed,
            task_bytes=task_bytes,
        )
    refuse_nothing_held_out(wanted)
    if dry_run:
        print(describe(wanted))
        return
    from cola_megatron.data import read_manifest
    from cola_megatron.errors import UserError
    from data_prep.local import usable_cores
    from data_prep.prepare import prepare

    fraction = "--held-out-fraction" if recipe is None else "held_out_fraction="
    folder = prepare(wanted, workers or usable_cores(), force=force)
    for split, streams in read_manifest(folder).splits.items():
        if not streams:
            raise UserError(
                f"{folder}: no document fell into {split}, so nothing can be trained on this. Documents are split by "
                f"hash: give more documents (one per line of a JSONL), or a larger {fraction}, with --force"
            )
    print(folder)


@app.command("submit")
def submit(
    recipe: Path = typer.Option(..., help="YAML file with sources, cleaning, packing."),
    overrides: list[str] = typer.Argument(None, help="Settings of the recipe, a.b=c."),
    output: Path = typer.Option(None, help="Folder to write."),
    elements: int = typer.Option(1000, min=1, help="Largest job array; its elements share the tasks."),
    concurrency: int = typer.Option(None, min=1, help="Elements that run at once."),
    directive: list[str] = typer.Option(
        [], help="A line for #SBATCH, such as --directive=--partition=cpu; repeatable."
    ),
    setup: list[str] = typer.Option([], help="A line of shell before the command; repeatable."),
    site: str = typer.Option(None, help="Site file or example, as for `cola submit`; by default $COLA_SITE, or none."),
    force: bool = typer.Option(False, help="Replace a data set made with other settings, and forget unfinished work."),
    dry_run: bool = typer.Option(False, help="Print the batch scripts; submit nothing."),
) -> None:
    """Prepare a data set with Slurm job arrays, one per step; submit again to go on after a failure.

    Example: `cola prep submit --recipe web.yaml --concurrency 200 --directive=--partition=cpu`
    """
    from data_prep.plan import make_plan, work_folder_of
    from data_prep.prepare import begin
    from launchers import prep_slurm
    from launchers.prep_recipes import from_file, refuse_nothing_held_out
    from launchers.slurm.queue import refuse_second

    wanted = from_file(recipe, overrides or [], output)
    refuse_nothing_held_out(wanted)
    plan = make_plan(wanted)
    settings = prep_slurm.ArraySettings(_site(site, directive, setup), elements, concurrency)
    if dry_run:
        print("\n".join(prep_slurm.scripts(plan, work_folder_of(plan.recipe.output), settings).values()), end="")
        return
    refuse_second(plan.recipe.output.expanduser())
    work = begin(plan, force)
    if work is None:
        print(f"{plan.recipe.output}: already prepared from these sources with this recipe; nothing to do")
        return
    for step, job in prep_slurm.submit(work, prep_slurm.scripts(plan, work, settings)).items():
        print(f"{step}: job {job}")
    print(f"logs in {work.path / 'logs'}; the data set appears as {plan.recipe.output.expanduser().absolute()}")


def _site(name: str | None, directives: list[str], setup: list[str]) -> "Site":
    from launchers.slurm.site import bare_site, load_site, site_without_gpus

    if name is None and "COLA_SITE" not in os.environ:
        return bare_site(directives, setup)
    site = site_without_gpus(load_site(name))
    more = {"directives": (*site.directives, *directives), "setup": (*site.setup, *setup)}
    return site.model_copy(update=more)


@app.command("task")
def task(
    work: Path = WORK,
    step: str = typer.Argument(..., help="Name of the step."),
    number: int = typer.Argument(..., min=0, help="Number of the task."),
    stride: int = typer.Option(None, min=1, help="Also run every stride-th task after it."),
) -> None:
    """Run tasks of a preparation: what a job array does. After the last one the data set is in its place.

    Example: `cola prep task data/web.work tokenize 7`
    """
    from data_prep.plan import open_plan
    from data_prep.prepare import finish, said_at_the_end
    from data_prep.steps import run_task, steps_of
    from data_prep.work import WorkFolder

    folder = WorkFolder(work.absolute())
    plan = open_plan(folder)
    steps = {each.name: each for each in steps_of(plan)}
    if step not in steps:
        raise typer.BadParameter(f"{step}: this preparation has the steps {', '.join(steps)}")
    if number >= steps[step].tasks:
        raise typer.BadParameter(f"{number}: step {step} has tasks 0 to {steps[step].tasks - 1}")
    with folder.in_use():
        for task_number in range(number, steps[step].tasks if stride else number + 1, stride or 1):
            run_task(plan, folder, steps[step], task_number)
    if step == "merge":
        finish(plan, folder)
        print("\n".join(said_at_the_end(plan.recipe.output.expanduser().absolute())))


@app.command("verify")
def verify(
    folder: Path = typer.Argument(..., help="A prepared folder."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """Read everything again and compare it with the manifest; names each bad file.

    Example: `cola prep verify data/embedded`
    """
    from data_prep.verify import verify as check

    report = check(folder)
    if as_json:
        answer: dict[str, Any] = {"ok": report.ok, "problems": list(report.problems)}
        print_json({**answer, "files": report.files, "bytes": report.bytes, "sequences": report.sequences})
    elif report.ok:
        print(
            f"{folder}: {report.files} files, {report.sequences:,} sequences, {report.bytes:,} bytes, all as recorded"
        )
    if not report.ok:
        for problem in report.problems:
            fail(problem, 1)
        raise typer.Exit(1)


@app.command("inspect")
def inspect(
    folder: Path = typer.Argument(
        ..., help="A prepared folder, or the work folder NAME.work of one that is not ready."
    ),
    rule: str = typer.Option(None, help="Only this rule, or the rules of this section."),
    as_json: bool = typer.Option(False, "--json", help="Print them as JSON."),
) -> None:
    """Look at documents that were removed: of each source and rule the number, and examples with their places.

    Example: `cola prep inspect data/web --rule gopher_quality`
    """
    from launchers.prep_inspect import print_removed, read_removed

    removed = read_removed(folder, rule)
    if as_json:
        print_json(removed)
    else:
        print_removed(removed)


@app.command("stats")
def stats(
    folder: Path = typer.Argument(..., help="A prepared folder."),
    figures: Path = typer.Option(None, help="Folder to write pictures to."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """What was read, removed by which rule, and written.

    Example: `cola prep stats data/web --figures figures`
    """
    from launchers.prep_stats import print_statistics, read_statistics

    statistics = read_statistics(folder)
    if as_json:
        print_json(statistics)
    else:
        print_statistics(statistics)
    if figures is not None:
        from data_prep.figures import write_figures

        for path in write_figures(statistics, figures):
            print(path)
