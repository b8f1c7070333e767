"""A run folder as a report reads it: at any time, of any version, whatever else is missing in it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cola_megatron.checkpoint.find import newest_checkpoint
from cola_megatron.checkpoint.state_file import read_config
from cola_megatron.config import ConfigError, RunConfig, stored_config
from cola_megatron.config.yaml_files import read_yaml
from cola_megatron.errors import UserError
from cola_megatron.families import family_of
from cola_megatron.planning.flops import training_flops
from cola_megatron.records.goodput import ATTEMPTS
from cola_megatron.records.metrics import readable_metrics
from cola_megatron.records.progress import PROGRESS
from cola_megatron.records.run_folder import CONFIG, MANIFEST, METRICS, SUMMARY, placed
from cola_megatron.records.texts import TEXTS, readable_texts

ENDED = ("finished", "stopped", "diverged")
"""States of progress.json after which nothing more is written."""


@dataclass(frozen=True)
class Cost:
    """What a run took to a step."""

    tokens: int
    flops: float
    seconds: float | None
    """In steps, measurements and saves; None: not recorded."""


@dataclass(frozen=True)
class Run:
    """What a run folder says."""

    folder: Path
    config: RunConfig
    records: list[dict]
    """Of metrics.jsonl, in today's names."""
    texts: list[dict]
    """Of texts.jsonl."""
    progress: dict[str, Any]
    manifest: dict[str, Any]
    began: float | None
    """First start, in seconds since 1970."""
    step: int
    """The last one that is known of."""
    notes: list[str]
    """What could not be read."""

    @property
    def state(self) -> str:
        """As in progress.json; "unknown" without it."""
        return str(self.progress.get("state", "unknown"))

    @property
    def has_ended(self) -> bool:
        """Whether nothing more is to be expected."""
        return self.state in ENDED or not self.progress

    def cost(self, step: int | None = None) -> Cost:
        """Up to a step; by default to the last."""
        step = self.step if step is None else step
        training, data = self.config.training, self.config.data
        seconds = [record["seconds"] for record in self.records if record["step"] <= step and "seconds" in record]
        tokens = step * training.global_batch_size * data.sequence_length
        return Cost(tokens, training_flops(self.config, step), max(seconds, default=None))

    def place(self, path: str | Path) -> Path:
        """A path of the config, where it is from here."""
        return Path(placed(path, self.config, self.folder))

    @property
    def data(self) -> str | None:
        """Folder or URL of the prepared data that the config names."""
        path = self.config.data.path
        return None if path is None else str(placed(path, self.config, self.folder))


def read_run(folder: Path) -> Run:
    """Reads a run folder.

    Raises:
        UserError: it is none, or no version of this package can read its config.
    """
    notes: list[str] = []
    config = _config(folder)
    records: list[dict] = []
    metrics = folder / METRICS
    if metrics.is_file():
        found, damaged = readable_metrics(metrics)
        records = [in_todays_names(record) for record in found]
        _note_damage(metrics, damaged, notes)
    else:
        notes.append(f"{metrics} does not exist: no curves")
    texts, damaged = readable_texts(folder)
    _note_damage(folder / TEXTS, damaged, notes)
    progress, manifest, summary = (_json(folder / name, notes) for name in (PROGRESS, MANIFEST, SUMMARY))
    known = [record["step"] for record in records if record["kind"] == "train"]
    step = progress.get("step", summary.get("step", max(known, default=0)))
    return Run(folder, config, records, texts, progress, manifest, _began(folder), int(step), notes)


def _note_damage(path: Path, lines: list[int], notes: list[str]) -> None:
    if lines:
        first = ", ".join(map(str, lines[:5])) + (", ..." if len(lines) > 5 else "")
        notes.append(f"{path}: lines that cannot be read are left out, {len(lines)} in all: {first}")


def in_todays_names(record: dict) -> dict:
    """A record of any version: `flow_matching_loss` is at uniform t, `..._training_times` at the run's own.

    Versions that measured only at the run's own times called that `flow_matching_loss`.
    """
    own = "flow_matching_loss_training_times"
    if record["kind"] != "evaluation" or "flow_matching_loss" not in record or own in record:
        return record
    return {re.sub(r"^flow_matching_loss(?=$|_bin_)", own, name): value for name, value in record.items()}


def stage_one_of(run: Run, given: Path | None = None) -> tuple[Run | None, int, str]:
    """The stage-1 run that a run started from, at which step, and else why there is none to show.

    Args:
        given: where it is now, if not where the config says.

    Raises:
        UserError: `given` is not the stage 1 of this run.
    """
    found, step, why = _stage_one_of(run, given)
    if given is not None and found is None:
        raise UserError(f"--stage-one {given} is not what {run.folder} started from: {why}")
    return found, step, why


def _stage_one_of(run: Run, given: Path | None) -> tuple[Run | None, int, str]:
    family = family_of(run.config)
    earlier = family.earlier_stage(run.config)
    if earlier.absent:
        return None, 0, earlier.absent
    if earlier.place is None and given is None:
        return None, 0, "its config names no training.stage_one"
    folder = given or run.place(earlier.place or "")
    step = None
    if match := re.fullmatch(r"step_(\d+)", folder.name):
        folder, step = folder.parent.parent, int(match[1])
    if not folder.is_dir():
        return None, 0, f"{folder}, which stage 2 started from, does not exist (any more): --stage-one says where it is"
    if not (folder / CONFIG).is_file() or not (folder / METRICS).is_file():
        return (
            None,
            0,
            f"stage 2 started from the weights in {folder}, which are no run: they have neither curves nor cost",
        )
    first = read_run(folder)
    if why_not := family.why_not_earlier(run.config, first.config):
        return None, 0, f"the run in {folder} {why_not}"
    if first.began is not None and run.began is not None and first.began > run.began:
        return None, 0, f"the run in {folder} began after this one: another run has that name now"
    return first, first.step if step is None else step, ""


def _config(folder: Path) -> RunConfig:
    path = folder / CONFIG
    if path.is_file():
        return stored_config(read_yaml(path), path)
    checkpoint = newest_checkpoint(folder) if folder.is_dir() else None
    if checkpoint is None:
        raise ConfigError(f"{folder} is no run folder: it has no {CONFIG}; give the folder that `cola train` writes")
    return read_config(checkpoint)


def _json(path: Path, notes: list[str]) -> dict[str, Any]:
    """A JSON object; nothing where there is none, and a note where it is damaged."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        found = error
    if isinstance(found, dict):
        return found
    notes.append(f"{path} cannot be read ({found}) and is left out")
    return {}


def _began(folder: Path) -> float | None:
    try:
        return float(json.loads((folder / ATTEMPTS).read_text().splitlines()[0])["began"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
