"""`cola sweep plan`: what a study will take."""

from pathlib import Path

import typer

from launchers.output import print_json

SOURCE = typer.Argument(..., metavar="STUDY", help="A study file, or one that ships with the package: rq1, rq4, ...")
SCALE = typer.Option(None, help="One of the file's scales; by default the published setting.")
DATA = typer.Option(None, help="Prepared data, in place of the file's.")
BENCHMARKS = typer.Option(None, help="Folder of the tasks' items, in place of the file's.")


def plan(
    source: str = SOURCE,
    scale: str = SCALE,
    data: str = DATA,
    benchmarks: Path = BENCHMARKS,
    gpus: int = typer.Option(None, min=1, help="GPUs of each run: adds layouts and GPU-hours."),
    gpu: str = typer.Option(
        None, help="A GPU of the table in docs/planning.md: a100, h100, h200, ...; by default the study's, else h100."
    ),
    gpus_per_node: int = typer.Option(8, min=1, help="GPUs that share NVLink."),
    runs: bool = typer.Option(False, "--runs", help="A line for each run as well."),
    as_json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """What a study will take: runs, tokens, FLOPs by column, layouts and GPU-hours of each arm. Nothing is written.

    Example: `cola sweep plan rq4 --gpus 64`
    """
    from cola_megatron.evaluation.results import format_table
    from cola_megatron.studies.expansion import expand
    from cola_megatron.studies.layouts import cluster_of, laid_out
    from cola_megatron.studies.study_file import load_study
    from launchers.sweep_files import study_file
    from launchers.sweep_jobs import check_settings
    from launchers.sweep_plan import reasons, rows_of, shares_of, steps_done

    study = load_study(study_file(source), scale, data, benchmarks)
    if gpu is not None and study.layouts is not None:
        study = study.model_copy(update={"layouts": study.layouts.model_copy(update={"gpu": gpu})})
    gpu = gpu or (study.layouts.gpu if study.layouts is not None else "h100")
    cluster = None if gpus is None else cluster_of(gpu, gpus, gpus_per_node)
    if gpus is not None:
        study = laid_out(study, gpus, gpus_per_node)
    expanded = expand(study, Path("STUDY"))
    check_settings(study, expanded)
    shares = shares_of(study, expanded, cluster)
    if as_json:
        print_json({"study": study.name, "scale": study.scale, "arms": [share.as_json() for share in shares]})
        return
    print(f"{study.title or study.name}, scale {study.scale}: {study.question}")
    print(f"{len(expanded.runs)} runs, {len(expanded.points)} points")
    if runs:
        table = [["run", "role", "steps", "starts from"]]
        table += [[run.name, run.role, f"{steps_done(run):,}", *(run.needs or ("",))] for run in expanded.runs.values()]
        print(format_table(table))
    for line in expanded.decisions:
        print(line)
    print(format_table(list(rows_of(shares, None if cluster is None else cluster.gpu.name))))
    for line in reasons(shares):
        print(line)
    if cluster is not None and study.layouts is not None:
        print(f"Layouts are planned: `cola sweep submit` on {gpus} GPUs a run trains under these")
    elif cluster is not None:
        fastest = f"with `layouts: {{gpu: {gpu}}}` in the study file, each under the fastest"
        print(f"Runs train under their config's own layout; {fastest}")
