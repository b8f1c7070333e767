"""`cola sweep`: a scaling study, from its file to its figure."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from launchers import submit_command, sweep_results
from launchers.output import print_json, print_table
from launchers.sweep_coordinates import coordinates
from launchers.sweep_plan_command import BENCHMARKS, DATA, SCALE, SOURCE, plan

if TYPE_CHECKING:
    from cola_megatron.studies.folder import StudyFolder
    from cola_megatron.studies.study_file import StudyConfig
    from launchers.sweep_run import Outcome

app = typer.Typer(
    help="A scaling study from one file: plan, run here or submit, then its table, fits and report.",
    epilog="Example: cola sweep run rq4 --scale tiny --output studies/rq4",
    no_args_is_help=True,
)

app.command("plan")(plan)
app.command("coordinates")(coordinates)

FOLDER = typer.Argument(..., help="Folder of a study.")
AT_ONCE = typer.Option(None, min=1, help="Jobs at a time; by default one for each GPU or core that a run takes.")
MEMORY = typer.Option(None, min=0.1, help="GiB of host memory for all of them; by default nine tenths of what is free.")
PROCESSES = typer.Option(1, min=1, help="Processes of each run, each on a GPU of its own where there are any.")
AS_JSON = typer.Option(False, "--json", help="As JSON.")


@app.command("run")
def run(
    source: str = SOURCE,
    output: Path = typer.Option(..., help="Folder of the study; the same command goes on where it was stopped."),
    scale: str = SCALE,
    data: str = DATA,
    benchmarks: Path = BENCHMARKS,
    at_once: int = AT_ONCE,
    memory: float = MEMORY,
    processes: int = PROCESSES,
    as_json: bool = AS_JSON,
) -> None:
    """Train, measure, collect, fit and report a study on this machine.

    Finished runs are passed over, those that were stopped go on. A run that fails holds up those that start from it
    and no other.

    Example: `cola sweep run rq4 --scale tiny --output studies/rq4`
    """
    from cola_megatron.studies.folder import StudyFolder
    from cola_megatron.studies.layouts import laid_out
    from cola_megatron.studies.study_file import load_study
    from launchers.sweep_files import study_file
    from launchers.sweep_machine import visible_gpus

    study = load_study(study_file(source), scale, data, benchmarks)
    _require_gpus(study, bool(visible_gpus()), "this machine")
    _refuse_second(output)
    study = laid_out(study, processes, processes)
    _go_on(StudyFolder.begin(output, study), [], at_once, memory, processes, as_json)


@app.command("submit")
def submit(
    source: str = SOURCE,
    output: Path = typer.Option(..., help="Folder of the study, on a file system that all nodes share."),
    scale: str = SCALE,
    data: str = DATA,
    benchmarks: Path = BENCHMARKS,
    nodes: int = submit_command.NODES,
    processes: int = submit_command.PROCESSES,
    concurrency: int = typer.Option(None, min=1, help="Elements of an array at a time."),
    site: str = submit_command.SITE,
    settings: list[str] = submit_command.SETTINGS,
    partition: str = submit_command.PARTITION,
    account: str = submit_command.ACCOUNT,
    time: str = submit_command.TIME,
    dry_run: bool = submit_command.DRY_RUN,
    as_json: bool = AS_JSON,
) -> None:
    """Hand a study to Slurm: its data, an array for each kind of run, one of measurements, and the report.

    Given again when all of it has left the queue, it submits what has not finished.

    Example: `cola sweep submit rq4 --output /shared/rq4 --nodes 8 --site our-cluster.yaml --data /shared/olmo2_512`
    """
    from cola_megatron.studies.folder import StudyFolder
    from cola_megatron.studies.layouts import laid_out
    from cola_megatron.studies.study_file import load_study
    from launchers.slurm.submission import shape_of
    from launchers.sweep_files import study_file
    from launchers.sweep_slurm import StudyOnSlurm

    study = load_study(study_file(source), scale, data, benchmarks)
    chosen = submit_command.chosen_site(site, settings, partition, account, time)
    shape = shape_of(chosen, nodes, processes)
    _require_gpus(study, bool(chosen.gpus_per_node), "this site")
    study = laid_out(study, shape.world_size, shape.processes)
    if dry_run:
        print(StudyOnSlurm(StudyFolder(output, study), chosen, shape, concurrency).dry_run(), end="")
        return
    parts = StudyOnSlurm(StudyFolder.begin(output, study), chosen, shape, concurrency).submit()
    if as_json:
        print_json({part.name: {"job": part.job, "elements": part.elements, "log": part.log} for part in parts})
        return
    print_table([(part.name, f"job {part.job}, {part.elements} elements, {part.log}") for part in parts])
    print_table([("state", f"cola sweep status {output}"), ("end it", f"cola cancel {output}")])


@app.command("measure", hidden=True)
def measure(
    folder: Path = FOLDER,
    points: Path = typer.Argument(..., help="File of the names of points, one per line."),
    number: int = typer.Argument(..., min=0, help="Line of the point, from 0."),
) -> None:
    """Measure one point of a study; what `cola sweep submit` runs on a node.

    Example: `cola sweep measure studies/rq4 points.txt 7`
    """
    from cola_megatron.config import ConfigError
    from cola_megatron.studies.folder import StudyFolder
    from launchers.sweep_jobs import measure_point

    names = points.read_text(encoding="utf-8").splitlines()
    if number >= len(names):
        raise ConfigError(f"{points} has {len(names)} lines, and {number} is asked for, from 0")
    raise typer.Exit(measure_point(StudyFolder.open(folder), names[number]))


@app.command("resume")
def resume(
    folder: Path = FOLDER,
    only: list[str] = typer.Option([], help="Only this run and what it needs; repeatable."),
    at_once: int = AT_ONCE,
    memory: float = MEMORY,
    processes: int = PROCESSES,
    as_json: bool = AS_JSON,
) -> None:
    """Go on with what has not finished; with `--only`, with those runs alone.

    Example: `cola sweep resume studies/rq4 --only cola-1e12-s66`
    """
    from cola_megatron.studies.folder import StudyFolder

    _refuse_second(folder)
    _go_on(StudyFolder.open(folder), only, at_once, memory, processes, as_json)


@app.command("status")
def status(
    folder: Path = FOLDER,
    rebuild_index: bool = typer.Option(False, "--rebuild-index", help="Make index.json anew from the runs."),
    as_json: bool = AS_JSON,
) -> None:
    """One line for each run and each point: what has become of it, and the last error of what failed.

    Example: `cola sweep status studies/rq4`
    """
    from cola_megatron.studies.folder import StudyFolder
    from launchers.sweep_status import status_rows

    opened = StudyFolder.rebuild(folder) if rebuild_index else StudyFolder.open(folder)
    rows = status_rows(opened)
    if as_json:
        print_json(rows)
        return
    shown = [(row["name"], row["role"], row["state"], row["progress"], row["note"]) for row in rows]
    widths = [max(len(each[column]) for each in shown) for column in range(4)]
    for each in shown:
        print("  ".join(cell.ljust(width) for cell, width in zip(each, [*widths, 0], strict=True)).rstrip())
    finished = sum(row["state"] == "finished" for row in rows)
    print(f"{finished} of {len(rows)} finished")


@app.command("collect")
def collect(folder: Path = FOLDER, as_json: bool = AS_JSON) -> None:
    """Read what the runs left into results.json and results.csv.

    Example: `cola sweep collect studies/rq4`
    """
    from cola_megatron.studies.collect import collect as read
    from cola_megatron.studies.folder import StudyFolder
    from cola_megatron.studies.results import RESULTS
    from launchers.sweep_status import StudyStates

    opened = StudyFolder.open(folder)
    document = read(opened, StudyStates(opened).of_run)
    if as_json:
        print_json(document)
        return
    rows, lost = document["rows"], document["lost"]
    for each in lost:
        print(f"{each['point']}: {each['why']}")
    print_table([("points", f"{len(rows) - len(lost)} of {len(rows)}"), ("table", str(folder / RESULTS))])


app.command("fit")(sweep_results.fit)
app.command("plot")(sweep_results.plot)
app.command("report")(sweep_results.report)


def _require_gpus(study: "StudyConfig", are_there: bool, where: str) -> None:
    """Of a study whose layouts are planned."""
    from cola_megatron.config import ConfigError

    if study.layouts is not None and not are_there:
        raise ConfigError(f"the study plans layouts of GPUs, and {where} has none: take layouts out of its file")


def _refuse_second(folder: Path) -> None:
    """Before the index is written, which the other goes by."""
    from cola_megatron.errors import UserError
    from cola_megatron.studies.folder import is_locked

    if is_locked(folder):
        raise UserError(
            f"{folder}: another `cola sweep` runs this study here; wait for its end, or end it with Ctrl-C there: "
            f"`cola sweep status {folder}` shows how far it is"
        )


def _go_on(
    opened: "StudyFolder",
    only: list[str],
    at_once: int | None,
    memory: float | None,
    processes: int,
    as_json: bool,
) -> None:
    from cola_megatron.config import ConfigError
    from cola_megatron.errors import ExitCode
    from cola_megatron.records.run_folder import lock_run_folder
    from launchers.sweep_jobs import jobs_of, with_needs
    from launchers.sweep_machine import machine
    from launchers.sweep_run import LocalScheduler

    layouts = opened.study.layouts
    if layouts is not None and layouts.gpus not in (None, processes):
        raise ConfigError(
            f"the layouts of this study are of {layouts.gpus} GPUs a run: give --processes {layouts.gpus}"
        )
    here = machine(at_once, memory, processes)
    jobs = jobs_of(opened, processes, on_gpus=bool(here.gpus))
    if only:
        jobs = with_needs(jobs, only)
    with lock_run_folder(opened.folder):
        outcome = LocalScheduler(jobs, here).run()
        _conclude(opened, outcome, as_json)
    if outcome.stopped:
        raise typer.Exit(ExitCode.STOPPED)
    if outcome.failed:
        raise typer.Exit(ExitCode.FAILED)


def _conclude(opened: "StudyFolder", outcome: "Outcome", as_json: bool) -> None:
    """Table, fits and report of what is there."""
    from cola_megatron.errors import UserError
    from cola_megatron.studies.collect import collect as read

    document = read(opened)
    page: Path | None = None
    why = ""
    if len(document["lost"]) < len(document["rows"]):
        from cola_megatron.studies.report.page import write_report

        try:
            page = write_report(opened.folder)
        except UserError as error:  # such as matplotlib, which is of another extra
            why = str(error)
    if as_json:
        print_json({"done": outcome.done, "failed": outcome.failed, "waiting": outcome.waiting, "report": page})
        return
    for name, said in outcome.failed.items():
        print(f"{name} failed: {said}; `cola sweep resume {opened.folder} --only {name}` tries it again")
    if outcome.waiting:
        print(f"not begun: {', '.join(outcome.waiting)}")
    rows, lost = document["rows"], document["lost"]
    print(f"{len(rows) - len(lost)} of {len(rows)} points are complete")
    if page is not None or why:
        print(f"report: {page}" if page is not None else f"no report: {why}")
