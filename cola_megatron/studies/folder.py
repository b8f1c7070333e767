"""The folder of a study: its index, its runs, and what has become of them.

OUTPUT/
    index.json          the study, and of each run what it is; made anew from the runs' study.json where it is lost
    data/               prepared tokens, where the study prepares them itself
    runs/NAME/          run folders as `cola train` writes them, with study.json, config of the study (requested.yaml),
                        what its process printed (log.txt) and measurements/step_.../
"""

from __future__ import annotations

import fcntl
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from cola_megatron.checkpoint.compatible import differing_keys
from cola_megatron.checkpoint.folder import folder_of
from cola_megatron.config import ConfigError, dump_config, resolve_tree, stored_tree, upgraded_tree
from cola_megatron.config.changes import upgraded
from cola_megatron.records.json_files import read_object, write_json, write_whole
from cola_megatron.records.progress import read_progress
from cola_megatron.records.run_folder import LOCK, SUMMARY
from cola_megatron.studies.expansion import expand
from cola_megatron.studies.measured import asked, missing
from cola_megatron.studies.runs import DATA, RUNS, Expanded, Point, StudyRun, identity_of
from cola_megatron.studies.study_file import StudyConfig

INDEX, OF_RUN, REQUESTED, LOG = "index.json", "study.json", "requested.yaml", "log.txt"
MEASUREMENTS = "measurements"

AT_WORK = ("starting", "training", "measuring", "saving")
"""States of progress.json that a process which ends in order leaves behind."""

RunState = Literal["finished", "running", "failed", "stopped", "not begun"]


class StudyFolder:
    """A study in its folder."""

    def __init__(self, folder: Path, study: StudyConfig):
        self.folder, self.study = folder.absolute(), study
        self.expanded: Expanded = expand(study, self.folder)

    @classmethod
    def begin(cls, folder: Path, study: StudyConfig) -> StudyFolder:
        """A new folder, or one of the same study: runs may have been added since, none may have changed.

        Raises:
            ConfigError: the folder is another study's, holds something else, or a run of it would be another now.
        """
        opened = cls(folder, study)
        if (opened.folder / INDEX).exists():
            opened._refuse_another(_read_index(opened.folder))
        elif opened.folder.is_dir() and any(path.name != LOCK for path in opened.folder.iterdir()):
            if any(opened.folder.glob(f"{RUNS}/*/{OF_RUN}")):
                raise ConfigError(
                    f"{folder} has no {INDEX}: `cola sweep status {folder} --rebuild-index` makes it anew"
                )
            raise ConfigError(f"{folder} is not empty and no study: give another --output")
        opened.write_index()
        return opened

    @classmethod
    def open(cls, folder: Path) -> StudyFolder:
        """The study that a folder was begun with; raises ConfigError."""
        tree = _read_index(folder)
        opened = cls(folder, _study_of(tree, folder / INDEX))
        opened._refuse_another(tree)
        return opened

    @classmethod
    def rebuild(cls, folder: Path) -> StudyFolder:
        """Makes the index anew from the runs; raises ConfigError where there are none, or they are of two studies."""
        trees: dict[str, Path] = {}
        for path in sorted(folder.glob(f"{RUNS}/*/{OF_RUN}")):
            tree = read_object(path).get("study")
            if tree:
                trees.setdefault(json.dumps(tree), path)
        if not trees:
            raise ConfigError(f"{folder}: no run there says which study it is of ({RUNS}/*/{OF_RUN})")
        if len(trees) > 1:
            first, second = list(trees.values())[:2]
            raise ConfigError(f"{first} and {second} are of two versions of the study: `cola sweep run` its file again")
        ((text, path),) = trees.items()
        opened = cls(folder, _study_of({"study": json.loads(text)}, path))
        opened.write_index()
        return opened

    def write_index(self) -> None:
        """index.json: the study, and what makes each run what it is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        runs = {name: {"role": run.role, "config": identity_of(run.config)} for name, run in self.expanded.runs.items()}
        write_json(self.folder / INDEX, {"study": stored_tree(self.study), "runs": runs})

    def prepare(self, run: StudyRun) -> Path:
        """Makes the folder of a run, and returns the config that it is to be trained with."""
        folder = self.run_folder(run.name)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / OF_RUN, {"study": stored_tree(self.study), "run": run.name, "role": run.role})
        write_whole(folder / REQUESTED, dump_config(run.config))
        return folder / REQUESTED

    @property
    def data(self) -> str:
        """What its runs are trained and measured on."""
        return self.study.data.path or str(self.folder / DATA)

    def run_folder(self, name: str) -> Path:
        """Of a run."""
        return self.folder / RUNS / name

    def checkpoint_of(self, point: Point) -> Path:
        """The checkpoint that a point is measured at."""
        return folder_of(self.run_folder(point.run), point.step)

    def measurements_of(self, point: Point) -> Path:
        """What was measured of a point."""
        return self.run_folder(point.run) / MEASUREMENTS / point.measured_as

    def missing_measures(self, point: Point) -> list[str]:
        """Files of its measurements that are not there."""
        return missing(self.study.measures, self.measurements_of(point))

    def state_of(self, name: str) -> RunState:
        """What has become of a run, from its folder alone."""
        folder, run = self.run_folder(name), self.expanded.runs.get(name)
        summary = read_object(folder / SUMMARY)
        if summary.get("finished") and (run is None or summary.get("step", math.inf) >= run.config.training.steps):
            return "finished"
        if is_locked(folder):
            return "running"
        state = read_progress(folder).get("state")
        if state == "stopped" or summary.get("finished"):  # a larger budget has come since
            return "stopped"
        # The log is there before the process has said or locked anything.
        return "failed" if state or last_line(folder / LOG) else "not begun"

    def error_of(self, name: str) -> str:
        """The last line that a run's process printed, and that it was killed where it did not come to say its end."""
        folder = self.run_folder(name)
        progress, said = read_progress(folder), last_line(folder / LOG)
        if progress.get("state") in AT_WORK and not is_locked(folder):
            killed = f"killed while {progress['state']}, after step {progress.get('step', 0)}"
            return f"{killed}; the last line: {said}" if said else killed
        return said

    def _refuse_another(self, index: dict[str, Any]) -> None:
        stored = _study_of(index, self.folder / INDEX)
        if (stored.name, stored.scale) != (self.study.name, self.study.scale):
            raise ConfigError(
                f"{self.folder} is of the study {stored.name} at scale {stored.scale}, not of {self.study.name} at "
                f"{self.study.scale}: give another --output"
            )
        for name, entry in index.get("runs", {}).items():
            run = self.expanded.runs.get(name)
            if run is None:
                if self.state_of(name) != "not begun":
                    raise ConfigError(f"{self.folder} has a run {name}, and this study has none: give another --output")
                continue
            differing = differing_keys(
                upgraded_tree(entry["config"], name), upgraded_tree(identity_of(run.config), name)
            )
            if differing and self.state_of(name) != "not begun":
                key, before, now = differing[0]
                raise ConfigError(
                    f"{self.folder}: the run {name} was begun with {key}={before!r} and would have {now!r} now: give "
                    "another --output"
                )
            self._refuse_steps_that_are_over(run, entry["config"])
        if stored != self.study:
            self._refuse_other_measurements(stored)

    def _refuse_steps_that_are_over(self, run: StudyRun, before: Mapping[str, Any]) -> None:
        """Checkpoints that a run was not asked for before, and is beyond."""
        folder = self.run_folder(run.name)
        added = set(run.config.training.checkpoint.at) - set(before["training"]["checkpoint"].get("at", ()))
        done = max(read_progress(folder).get("step", 0), read_object(folder / SUMMARY).get("step", 0))
        over = [step for step in sorted(added) if step <= done and not folder_of(folder, step).is_dir()]
        if over:
            raise ConfigError(
                f"{self.folder}: the run {run.name} is beyond step {over[0]}, where it would need a checkpoint now, "
                "and has none: give another --output, or only budgets beyond what it has done"
            )

    def _refuse_other_measurements(self, stored: StudyConfig) -> None:
        """What was measured with other settings would stand in the table beside what is measured with these."""
        before = {point.name: _asked(stored, point) for point in expand(stored, self.folder).points}
        for point in self.expanded.points:
            was, now = before.get(point.name, {}), _asked(self.study, point)
            for name in was.keys() & now.keys():
                if was[name] != now[name] and (self.measurements_of(point) / name).is_file():
                    raise ConfigError(
                        f"{self.folder}: {name} of {point.name} was measured with {was[name]}, and would be with "
                        f"{now[name]} now: give another --output, or remove {MEASUREMENTS}/*/{name} of its runs"
                    )


def _asked(study: StudyConfig, point: Point) -> dict[str, dict[str, Any]]:
    return asked(study.measures, point.generation, study.arms[point.arm].likelihood)


def is_locked(run_folder: Path) -> bool:
    """Whether a job trains in a run folder now."""
    path = run_folder / LOCK
    if not path.is_file():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks does not know
            return False
    return False


def last_line(log: Path, but: re.Pattern[str] | None = None) -> str:
    """The last line of a log that says something; empty where there is none.

    Args:
        but: beginnings of lines that do not count.
    """
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    said = (line.strip() for line in reversed(lines))
    return next((line for line in said if line and (but is None or not but.match(line))), "")


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise ConfigError(f"{folder} is no study: it has no {INDEX}; give the --output of `cola sweep run`")
    found = read_object(path)
    if "study" not in found:
        raise ConfigError(f"{path} cannot be read: `cola sweep status {folder} --rebuild-index` makes it anew")
    return found


def _study_of(index: dict[str, Any], source: Path) -> StudyConfig:
    tree = upgraded(index["study"], StudyConfig.history or (), source)
    try:
        return resolve_tree(StudyConfig, tree)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
