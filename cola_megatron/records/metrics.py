"""Where the numbers of a run go: metrics.jsonl always, wandb and TensorBoard as configured."""

import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cola_megatron.config import ConfigError, RunConfig
from cola_megatron.records.json_files import IsRecord, as_lines, read_lines, repair_lines, write_whole
from cola_megatron.records.on_disk import flush
from cola_megatron.records.tensorboard_log import TensorBoardLog


class MetricsLog:
    """Appends one JSON object per line; `kind` is "train", "evaluation" or "checkpoint".

    Every record has `seconds`, the time of the run until then. That of a checkpoint comes when it is complete, so after
    those of later steps; it says for how many seconds training was `blocked`, for how many `writing` went on, and how
    many `bytes` the tensors have.

    A resumed run first drops the lines after its checkpoint, so that every step stands there once. A number that is not
    finite is null.
    """

    def __init__(self, config: RunConfig, resumed_at: int):
        self.path = config.run_folder / "metrics.jsonl"
        drop_after(self.path, resumed_at)
        self.file = self.path.open("a", buffering=1)  # a line is on its way to the disk when it ends
        self.wandb = _start_wandb(config)
        self.tensorboard = TensorBoardLog(config, resumed_at) if config.training.log.tensorboard else None

    def write(self, kind: str, step: int, values: Mapping[str, object]) -> None:
        """Records the values of a finished step (counted from 1)."""
        self.file.write(as_lines([{"kind": kind, "step": step, **values}]))
        if self.wandb is not None:
            self.wandb.log({"step": step, **{f"{kind}/{name}": value for name, value in values.items()}})
        if self.tensorboard is not None:
            self.tensorboard.write(kind, step, values)

    def flush(self) -> None:
        """Returns when the records are on the disk: a run that goes on from a checkpoint has those before it."""
        flush(self.path)
        flush(self.path.parent)

    def close(self) -> None:
        """Flushes, and ends the wandb run."""
        self.file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def drop_after(path: Path, step: int) -> None:
    """Takes the records of later steps, and lines that are damaged, out of a file of records, if there is one."""
    repair_lines(path, _is_record, keep=lambda record: record["step"] <= step)


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl that can be read."""
    return readable_metrics(path)[0]


def readable_metrics(path: Path, is_record: IsRecord = lambda record: True) -> tuple[list[dict], list[int]]:
    """The records of a metrics.jsonl, or another file of records, and the numbers (from 1) of the lines that are none.

    A number that was not finite, null in the file, is NaN here. Of a last line without an end see `read_lines`.
    """
    records, damaged = read_lines(path, lambda record: _is_record(record) and is_record(record))
    return [{name: math.nan if value is None else value for name, value in each.items()} for each in records], damaged


def _is_record(record: dict[str, Any]) -> bool:
    return isinstance(record.get("kind"), str) and isinstance(record.get("step"), int)


def _start_wandb(config: RunConfig):
    if config.training.log.wandb == "disabled":
        return None
    import wandb

    try:
        run = wandb.init(
            project=config.training.log.wandb_project,
            name=config.name,
            group=config.training.log.wandb_group,
            id=_wandb_id(config),
            resume="allow",
            mode=config.training.log.wandb,
            dir=str(config.run_folder),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.errors.Error as error:
        raise ConfigError(
            f"training.log.wandb={config.training.log.wandb}: wandb did not start ({error}); log in, or use offline"
        ) from error
    # Our own axis: wandb's may only rise, and drops what a resumed run takes again.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _wandb_id(config: RunConfig) -> str:
    """One id for all jobs of a run, kept in its folder: names repeat, ids must not."""
    path = config.run_folder / "wandb_id"
    known = path.read_text().strip() if path.is_file() else ""
    if not known:  # or a full disk left it empty
        known = uuid.uuid4().hex
        write_whole(path, known)
    return known
