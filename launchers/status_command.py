"""`cola status` and `cola cancel`: what the runs do, from the queue and from their folders."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from launchers.output import print_json

if TYPE_CHECKING:
    from launchers.slurm.runs import RunState

FOLDERS = typer.Argument(None, help="Run folders, folders of arrays or pipelines, or a folder of many; default: runs.")


def status(
    folders: list[Path] = FOLDERS,
    as_json: bool = typer.Option(False, "--json", help="A list with one object for each run."),
) -> None:
    """One line for each run: job, step, loss, tokens/s, time left; also after its jobs have ended.

    Example: `cola status runs/sweep`
    """
    from launchers.slurm.commands import NoSlurm, SlurmError
    from launchers.slurm.queue import read_queue
    from launchers.slurm.runs import find_runs, state_of

    queue, silence = None, None
    try:
        queue = read_queue()
    except SlurmError as error:
        silence = error
    found = [state_of(folder, queue) for folder in find_runs(folders_that_exist(folders))]
    if as_json:
        print_json([asdict(each) for each in found])
    else:
        _print_states(found, folders)
    if silence is not None and not isinstance(silence, NoSlurm):
        raise silence


def _print_states(found: "list[RunState]", folders: list[Path]) -> None:
    if not found:
        print(f"no runs in {', '.join(map(str, folders or [Path('runs')]))}")
        return
    rows = [("run", "state", "job", "step", "loss", "tokens/s", "left", "tries", "")]
    for each in found:
        progress = "-" if each.step is None else f"{each.step:,}" + (f"/{each.steps:,}" if each.steps else "")
        rows.append(
            (
                str(each.run_folder),
                each.state,
                each.job or "-",
                progress,
                "-" if each.loss is None else f"{each.loss:.4f}",
                "-" if each.tokens_per_second is None else f"{each.tokens_per_second:,.0f}",
                "-" if each.seconds_left is None else _duration(each.seconds_left),
                str(each.tries),
                each.note,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def folders_that_exist(folders: list[Path] | None) -> list[Path]:
    """The given folders, by default runs/, which need not exist yet; raises ConfigError for one that does not."""
    from cola_megatron.config import ConfigError

    for folder in folders or []:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder; give run folders, or a folder of many")
    return folders or [Path("runs")]


def cancel(
    targets: list[str] = typer.Argument(..., help="Job ids, run folders, or folders of arrays and pipelines."),
) -> None:
    """Cancel the jobs of runs. What trains saves first, if Slurm leaves it the time; it can be submitted again.

    Examples: `cola cancel 4711`; `cola cancel runs/sweep`
    """
    from cola_megatron.config import ConfigError
    from launchers.slurm import commands
    from launchers.slurm.queue import read_queue

    queue, jobs = read_queue(), []
    for target in targets:
        if target.replace("_", "").isdecimal():
            jobs.append(target)
            continue
        below = [job.id for job in queue.below(Path(target))]
        if not below and not Path(target).is_dir():
            raise ConfigError(f"{target}: neither a job id nor a folder of runs")
        jobs += below
    commands.cancel(jobs)
    print(f"cancelled {', '.join(jobs)}" if jobs else "nothing of it is in the queue")


def _duration(seconds: float) -> str:
    days, rest = divmod(int(seconds), 86_400)
    clock = f"{rest // 3_600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days}-{clock}" if days else clock
