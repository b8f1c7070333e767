"""From a study to its runs and points.

Everything follows from the study alone, names too, so that a study which is opened again finds its folders.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from cola_megatron.config import ConfigError
from cola_megatron.studies.line import OF_TRAINING, StudyLine, combinations
from cola_megatron.studies.runs import Expanded, Point, StudyRun, identity_of
from cola_megatron.studies.study_file import StudyConfig


def expand(study: StudyConfig, folder: Path) -> Expanded:
    """The runs and points of a study in this folder.

    Raises:
        ConfigError: an arm, setting or budget that makes no run, and two that make the same.
    """
    runs: dict[str, StudyRun] = {}
    by_identity: dict[str, StudyRun] = {}
    measured: dict[tuple[str, int, str], Point] = {}
    points: list[Point] = []
    for builder in _lines(study, folder.absolute()):
        first = builder.stage_one()
        if first is not None:
            first = by_identity.setdefault(_identity(first), first)  # one for all arms and settings that share it
            runs[first.name] = first
        line = builder.build(first)
        same = {run.name: by_identity.setdefault(_identity(run), run) for run in line.runs}
        for run in line.runs:
            if same[run.name] is run and run.name in runs:
                raise ConfigError(f"two runs have the name {run.name}: labels must differ in their letters and digits")
            runs.setdefault(same[run.name].name, same[run.name])
        for point in (replace(point, run=same[point.run].name) for point in line.points):
            other = measured.setdefault((point.run, point.step, json.dumps(point.generation, sort_keys=True)), point)
            if other is not point:
                raise ConfigError(
                    f"{point.name} and {other.name} are two equal runs: leave out an arm, size or setting"
                )
            points.append(point)
    return Expanded(runs, points)


def _identity(run: StudyRun) -> str:
    """What it computes: where it starts is in what it needs, or in what its arm was given."""
    training = run.config.training
    given = [] if run.needs else [str(getattr(training, key, None)) for key in ("start_from", "stage_one")]
    return json.dumps([run.role, run.needs, given, identity_of(run.config)], sort_keys=True)


def _lines(study: StudyConfig, folder: Path) -> Iterator[StudyLine]:
    for arm, of_arm in study.arms.items():
        chosen = combinations(study.axes_of(arm, *OF_TRAINING))
        for size, settings, seed in itertools.product(of_arm.sizes or {"": {}}, chosen, study.seeds):
            yield StudyLine(study, folder, arm, size, settings, seed)
