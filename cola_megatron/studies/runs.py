"""What a study consists of: runs, one for each run folder, and points, a row of the table for a run at a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cola_megatron.config import RunConfig, stored_tree
from cola_megatron.studies.study_file import Overrides

RUNS, DATA = "runs", "data"
"""In the folder of a study."""
STAGE_ONE, START_FROM = "training.stage_one", "training.start_from"
PLACES = ("runs_folder", "name", "data.path", STAGE_ONE, START_FROM, "training.log.wandb_group")
"""Keys that say where a run lies and where it comes from, which its name says as well."""
Role = Literal["stage_one", "trunk", "run"]


@dataclass(frozen=True)
class StudyRun:
    """A run folder of a study."""

    name: str
    role: Role
    config: RunConfig
    needs: tuple[str, ...] = ()
    """Runs that must have ended before: the stage 1 or the trunk that it starts from."""
    begins_at: int = 0
    """Step of the trunk's checkpoint that a branch goes on from; it does the steps after it."""


@dataclass(frozen=True)
class Point:
    """One row of the table: a run at a step."""

    name: str
    arm: str
    size: str
    settings: Mapping[str, str]
    """Label of each axis that its arm has."""
    generation: Overrides
    """Settings of generation, those of its arm among them."""
    measured_as: str
    """Folder of its measurements below those of its run; points of one run that are measured alike share it."""
    seed: int
    budget: float
    run: str
    step: int
    stage_one: str | None
    trunk: str | None
    items: Overrides = field(default_factory=dict)
    """Which of the measured items count; none: all."""


@dataclass(frozen=True)
class Expanded:
    """All of a study."""

    runs: Mapping[str, StudyRun]
    """In an order in which each comes after what it needs."""
    points: Sequence[Point]
    decisions: Sequence[str] = ()
    """What the study's rules set for each arm, size, setting and budget, and what they rounded, a line each."""

    def measured_once(self) -> list[Point]:
        """The points without those whose measurements are another's as well."""
        return list({(point.run, point.measured_as): point for point in reversed(self.points)}.values())[::-1]


def identity_of(config: RunConfig) -> dict[str, Any]:
    """What makes a run what it is: its config without where it lies."""
    tree = stored_tree(config)
    for key in PLACES:
        *sections, last = key.split(".")
        place: Any = tree
        for section in sections:
            place = place.get(section, {})
        place.pop(last, None)
    return tree
