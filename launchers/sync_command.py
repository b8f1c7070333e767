"""`cola sync`: to wandb what was recorded without a network."""

import subprocess
import sys
from pathlib import Path

import typer

from launchers.output import print_json
from launchers.status_command import folders_that_exist

OFFLINE, SYNCED = "wandb/offline-run-*", "*.wandb.synced"


def sync(
    folders: list[Path] = typer.Argument(None, help="Run folders, or folders of many; default: runs."),
    dry_run: bool = typer.Option(False, "--dry-run", help="List what would be uploaded."),
    as_json: bool = typer.Option(False, "--json", help="What was, or would be, uploaded, as JSON."),
) -> None:
    """Upload the offline records of runs (training.log.wandb=offline), for machines that have a network.

    All jobs of a run become one run of wandb, in order of time; what is uploaded already is left out.

    Example: `cola sync runs/sweep`
    """
    from launchers.slurm.runs import find_runs

    found = {run: waiting(run) for run in find_runs(folders_that_exist(folders))}
    found = {run: records for run, records in found.items() if records}
    for run, records in found.items():
        if not as_json:
            print(f"{run}: {len(records)} offline record{'s' if len(records) > 1 else ''}")
        if not dry_run:
            upload(run, records)
    if as_json:
        print_json([{"run_folder": run, "records": records} for run, records in found.items()])
    elif not found:
        print("nothing waits to be uploaded")


def waiting(run_folder: Path) -> list[Path]:
    """The offline records of a run that were not uploaded yet, oldest first (their names begin with the time)."""
    return [path for path in sorted(run_folder.glob(OFFLINE)) if not any(path.glob(SYNCED))]


def upload(run_folder: Path, records: list[Path]) -> None:
    """Hands the records of a run to wandb.

    Raises:
        UserError: wandb is not logged in, or cannot be reached.
    """
    from cola_megatron.errors import UserError

    run_id = (run_folder / "wandb_id").read_text()
    command = [sys.executable, "-m", "wandb", "sync", "--id", run_id, *map(str, records)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    # It ends well where single records failed; the mark beside a record tells.
    if done.returncode or any(record in waiting(run_folder) for record in records):
        said = " ".join((done.stderr or done.stdout).split())[-300:]
        raise UserError(f"{run_folder}: wandb did not take it ({said}); `wandb login`, see that there is a network")
