"""What a run folder says of its run: config, starts, how it ended.

config.yaml     the resolved config of the last start
manifest.json   command, versions and git revision of the first start, and under `resumed` of each later one
tokenizer.json  the tokenizer of its tokens (`checkpoint.tokenizer`)
summary.json    how the last job of the run ended
"""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from cola_megatron.config import RunConfig, dump_config
from cola_megatron.errors import ExitCode, UserError
from cola_megatron.records.json_files import read_object, set_aside_if_damaged, write_json, write_whole
from cola_megatron.records.metrics import read_metrics
from cola_megatron.records.on_disk import flush
from cola_megatron.records.progress import PROGRESS
from cola_megatron.records.provenance import provenance

logger = logging.getLogger(__name__)

CONFIG, MANIFEST, SUMMARY, METRICS, LOCK = "config.yaml", "manifest.json", "summary.json", "metrics.jsonl", ".lock"


@dataclass(frozen=True)
class Summary:
    """How a job of a run ended."""

    run_folder: str
    step: int
    finished: bool
    """False: stopped by `stop_after` or a signal; the run resumes from its checkpoint."""
    tokens: int
    model_flops: float
    seconds: float
    """Time in training steps, measurements and saves, over all jobs of this run."""
    metrics: dict[str, float]
    """The last held-out measurement."""
    measured_at: int = 0
    """The step of that; 0: there was none, or an older version wrote this."""
    stopped_by_signal: bool = False
    """A signal asked for the end before it was due; the state is saved."""
    restarts: int = 0
    """Starts of the run before its last."""
    lost_steps: int = 0
    """Steps that were taken more than once."""
    goodput: float | None = None
    """See `records.progress`; None on all processes but the main one."""


class RunFolderTaken(UserError):
    """Another job trains in this run folder."""

    exit_code = ExitCode.CRASHED  # it may be the last try of this job, not quite ended


@contextlib.contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Claims a run folder for this job within the block, and until the process ends where that comes first.

    A run that is refused before it writes anything leaves no folder behind. On a file system without locks there is a
    warning instead: a run there is worth more than the claim.

    Raises:
        RunFolderTaken: another job holds it.
    """
    file = _locked(folder)
    try:
        yield
    finally:
        if never_began(folder):
            (folder / LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another job has begun to write there
                folder.rmdir()
        file.close()


def never_began(folder: Path) -> bool:
    """Whether a run folder holds its lock and nothing else: a run that was killed, or is, before its first file."""
    return folder.is_dir() and [path.name for path in folder.iterdir()] == [LOCK]


def _locked(folder: Path) -> IO:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RunFolderTaken(f"{folder}: another job is training here; wait for it, or use another name=") from None
    except OSError as error:  # Lustre without -o flock, NFS without its lock daemon
        logger.warning(
            "%s: this file system has no locks (%s), so that nothing here sees whether another job trains in the same "
            "folder: see to it that none does, or give a runs_folder= elsewhere",
            folder,
            error.strerror,
        )
    if not path.exists() or os.fstat(file.fileno()).st_ino != path.stat().st_ino:
        # A run that was refused has taken its lock away between our opening and our claim.
        file.close()
        return _locked(folder)
    return file


def record_start(config: RunConfig) -> None:
    """Writes config.yaml and notes this start in manifest.json; the main process calls it."""
    folder = config.run_folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in (MANIFEST, SUMMARY, PROGRESS):
        set_aside_if_damaged(folder / name)
    write_whole(folder / CONFIG, dump_config(config))
    path = folder / MANIFEST
    manifest: dict[str, Any] = read_object(path)
    if manifest:
        manifest.setdefault("resumed", []).append(provenance())
    else:
        manifest = provenance()
    write_json(path, manifest)
    flush(folder.parent)


def placed(path: str | Path, config: RunConfig, folder: Path) -> str | Path:
    """A path or URL of the config of the run in `folder`, which it may have had from another working directory.

    A relative one is looked for from where the run's own `runs_folder/name` leads here, so that a run that was moved
    together with its neighbours finds them, and not what has the same path elsewhere.
    """
    if "://" in str(path):
        return path
    path, own, here = Path(path).expanduser(), config.run_folder, folder.resolve()
    if path.is_absolute() or own.is_absolute() or here.parts[-len(own.parts) :] != own.parts:
        return path
    found, working = Path(*here.parts[: -len(own.parts)]) / path, Path.cwd()
    return found.relative_to(working) if found.is_relative_to(working) else found


def write_summary(summary: Summary) -> None:
    """Writes summary.json."""
    write_json(Path(summary.run_folder) / SUMMARY, asdict(summary))


def finished_summary(config: RunConfig, step: int) -> Summary | None:
    """The summary of a run that has nothing left to do at its checkpoint of `step`, else None.

    A run whose summary is lost or damaged has to write it: it measures, where that is missing, and ends.
    """
    if step < config.training.steps:
        return None
    try:
        summary = Summary(**read_object(config.run_folder / SUMMARY))
    except TypeError:
        return None
    return summary if summary.finished and summary.step == step else None


@dataclass(frozen=True)
class History:
    """What the jobs before a resumed step left in metrics.jsonl."""

    seconds: float = 0.0
    measured_at: int = 0
    """Step of the last held-out measurement; 0: none."""
    measured: dict[str, float] | None = None


def read_history(run_folder: Path, step: int) -> History:
    """The records of steps up to `step`."""
    path = run_folder / METRICS
    if not step or not path.exists():
        return History()
    records = [record for record in read_metrics(path) if record["step"] <= step]
    seconds = max((record.get("seconds", 0.0) for record in records), default=0.0)
    last = next((record for record in reversed(records) if record["kind"] == "evaluation"), None)
    if last is None:
        return History(seconds)
    measured = {name: value for name, value in last.items() if name not in ("kind", "step", "seconds")}
    return History(seconds, last["step"], measured)
