"""Run folders side by side: what each of them has come to, read from its records alone, finished or not."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cola_megatron.config import ConfigError, RunConfig, stored_config, upgraded_tree
from cola_megatron.config.yaml_files import read_yaml
from cola_megatron.planning.flops import training_flops_by_step
from cola_megatron.records.metrics import read_metrics
from cola_megatron.records.progress import read_progress
from cola_megatron.records.run_folder import CONFIG, METRICS, never_began

logger = logging.getLogger(__name__)

LIKELIHOOD = "nats_per_token"
"""What families compare by: -log p of the held-out texts, exact or an upper bound."""
HEADLINE, OWN_TIMES = "flow_matching_loss", "flow_matching_loss_training_times"
ENDED = ("finished", "stopped", "diverged")
SILENT_AFTER = 120.0
"""Seconds without a sign of a run that has not ended, after which its state says so."""
_NO_METRICS = ("kind", "step", "seconds")


@dataclass(frozen=True)
class ComparedRun:
    """A run as its folder describes it at this moment."""

    label: str
    """Its name, or its folder where names of the compared runs repeat."""
    folder: Path
    config: RunConfig
    tree: dict[str, Any]
    """Its stored config as a tree of today; with removed keys whose value this version does not reproduce."""
    records: list[dict]
    """Of metrics.jsonl, those of old versions under today's names (`as_measured_today`)."""
    has_old_measurements: bool
    """Some of the records needed that."""
    step: int
    state: str
    """As progress.json says, and for how long there has been no sign of a run that has not ended."""
    flops_of_step: Callable[[int], float]
    """Model FLOPs of the first so many steps of this stage."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimiser step, over all ranks."""
        return self.config.training.global_batch_size * self.config.data.sequence_length

    @property
    def seconds(self) -> float:
        """Time of the run until its last record, over all of its jobs."""
        return max((record["seconds"] for record in self.records if "seconds" in record), default=0.0)

    @property
    def measured_at(self) -> int | None:
        """Step of the last held-out measurement; None: there is none yet."""
        last = self._last_measurement()
        return None if last is None else last["step"]

    @property
    def measured(self) -> dict[str, float]:
        """The last held-out measurement."""
        last = self._last_measurement() or {}
        return {name: value for name, value in last.items() if name not in _NO_METRICS}

    def _last_measurement(self) -> dict | None:
        return next((record for record in reversed(self.records) if record["kind"] == "evaluation"), None)


def read_runs(folders: Sequence[Path]) -> list[ComparedRun]:
    """The runs in two or more folders, of any stage and of any schema; one that never began is passed over with a line.

    Raises:
        ConfigError: fewer than two, one of them twice, a folder that is no run, or a config of a newer version.
    """
    for folder in filter(never_began, folders):
        logger.warning("%s: this run has no records, since it ended, or is, before its first step: left out", folder)
    folders = [folder for folder in folders if not never_began(folder)]
    if len(folders) < 2:
        raise ConfigError(f"a comparison needs two run folders or more, not {len(folders)}: cola compare RUN RUN ...")
    seen: dict[Path, Path] = {}
    for folder in folders:
        if (first := seen.get(folder.resolve())) is not None:
            twice = str(folder) if first == folder else f"{first} and {folder}"
            raise ConfigError(f"{twice}: the same run twice; give each run once")
        seen[folder.resolve()] = folder
    found = [_stored(folder) for folder in folders]
    names = [config.name for _, config in found]
    return [
        _read_run(folder, config.name if len(set(names)) == len(names) else str(folder), tree, config)
        for folder, (tree, config) in zip(folders, found, strict=True)
    ]


def as_measured_today(record: dict) -> dict:
    """A record of any version, with its losses under the names that they have today.

    Before there was a measurement at equally spaced times, `flow_matching_loss` was the one at the run's own
    distribution of t, in bins too. The bins have no name today, and are left out.
    """
    if record["kind"] != "evaluation" or HEADLINE not in record or OWN_TIMES in record:
        return record
    renamed = {OWN_TIMES if name == HEADLINE else name: value for name, value in record.items()}
    return {name: value for name, value in renamed.items() if not name.startswith(f"{HEADLINE}_bin_")}


def _stored(folder: Path) -> tuple[dict[str, Any], RunConfig]:
    path = folder / CONFIG
    if not path.is_file() or not (read_progress(folder) or (folder / METRICS).is_file()):
        raise ConfigError(f"{folder}: no run folder; {_runs_below(folder)}")
    tree = read_yaml(path)
    return upgraded_tree(tree, path), stored_config(tree, path)


def _runs_below(folder: Path) -> str:
    if not folder.is_dir():
        return "there is no such folder"
    below = sorted(path.parent.name for path in folder.glob(f"*/{METRICS}"))
    if below:
        return f"it holds the runs {', '.join(below)}: give each of them"
    return f"`cola train` writes {CONFIG} and {METRICS} into one"


def _read_run(folder: Path, label: str, tree: dict[str, Any], config: RunConfig) -> ComparedRun:
    path, progress = folder / METRICS, read_progress(folder)
    records = read_metrics(path) if path.is_file() else []
    today = [as_measured_today(record) for record in records]
    last = max((record["step"] for record in records), default=0)
    return ComparedRun(
        label=label,
        folder=folder,
        config=config,
        tree=tree,
        records=today,
        has_old_measurements=any(new is not old for new, old in zip(today, records, strict=True)),
        # A run that writes no progress.json any more may have come further than it says.
        step=max(last, progress.get("step", 0)),
        state=_state(progress),
        flops_of_step=training_flops_by_step(config),
    )


def _state(progress: dict[str, Any]) -> str:
    state = progress.get("state", "unknown")
    silent = time.time() - progress.get("time", time.time())
    if state in ENDED or silent < SILENT_AFTER:
        return state
    hours = silent / 3600
    return f"{state}, no sign for {f'{hours:.0f} h' if hours >= 1 else f'{silent / 60:.0f} min'}"
