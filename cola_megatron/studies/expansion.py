"""From a study to its runs and points.

Everything follows from the study alone, names too, so that a study which is opened again finds its folders.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from cola_megatron.config import ConfigError, resolve_config
from cola_megatron.planning.plan import with_choices
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
    points: dict[str, Point] = {}
    measured: dict[str, Point] = {}
    decisions: dict[str, None] = {}

    def shared(run: StudyRun) -> StudyRun:
        """The one run for all arms and settings that train the same."""
        one = by_identity.setdefault(_identity(run), run)
        if runs.setdefault(one.name, one) is not one:
            raise ConfigError(f"two runs have the name {one.name}: labels must differ in their letters and digits")
        return one

    for builder in _lines(study, folder.absolute()):
        first = builder.stage_one()
        line = builder.build(None if first is None else shared(first))
        decisions |= dict.fromkeys(line.decisions)  # alike for all seeds
        same: dict[str, str] = {}
        for run in line.runs:
            same[run.name] = shared(replace(run, needs=tuple(same.get(need, need) for need in run.needs))).name
        for own in line.points:
            trunk = None if own.trunk is None else same[own.trunk]
            point = _measured_apart(replace(own, run=same[own.run], trunk=trunk), study, measured)
            if points.setdefault(point.name, point) is not point:
                raise ConfigError(
                    f"two points have the name {point.name}: labels must differ in their letters and digits, budgets "
                    "in their first four digits"
                )
    return Expanded(_laid_out(runs, study), list(points.values()), list(decisions))


def _laid_out(runs: dict[str, StudyRun], study: StudyConfig) -> dict[str, StudyRun]:
    """The runs under the layouts that were planned for them."""
    planned = {} if study.layouts is None else study.layouts.of_runs
    found = {}
    for name, run in runs.items():
        config = with_choices(run.config, planned.get(name, {}))
        found[name] = replace(run, config=resolve_config(config.model_dump())) if name in planned else run
    return found


def _measured_apart(point: Point, study: StudyConfig, measured: dict[str, Point]) -> Point:
    """The point, in a folder of its own where another of its run is measured in another way.

    One that is measured in the same way counts other items, or is a row of another arm's axis, such as the setting that
    two axes have in common, and has the folder of the first. Raises ConfigError where it is the same row.

    Args:
        measured: the first point of each way of measuring, and of each part of its items; they are added to.
    """
    way = json.dumps([point.run, point.step, point.generation, study.arms[point.arm].likelihood], sort_keys=True)
    row = f"{way} {json.dumps(point.items, sort_keys=True)}"
    first, other = measured.get(way), measured.get(row)
    if other is not None and (point.arm == other.arm or not (point.settings or other.settings)):
        raise ConfigError(f"{point.name} and {other.name} are two equal runs: leave out an arm, size or setting")
    if first is not None:
        point = replace(point, measured_as=first.measured_as)
    elif any((point.run, point.measured_as) == (each.run, each.measured_as) for each in measured.values()):
        point = replace(point, measured_as=f"{point.measured_as}-{point.arm}")
    measured.setdefault(way, point)
    measured.setdefault(row, point)
    return point


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
