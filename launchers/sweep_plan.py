"""What a study will take before it begins: runs, tokens, FLOPs by column; on GPUs the layout and hours of each arm."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cola_megatron.config import ConfigError, RunConfig
from cola_megatron.planning.compute import COLUMNS, compute_of, tokens_of
from cola_megatron.planning.hardware import GIB
from cola_megatron.planning.plan import Cluster, Layout
from cola_megatron.studies.layouts import LayoutPlanner
from cola_megatron.studies.runs import Expanded, StudyRun
from cola_megatron.studies.study_file import StudyConfig
from cola_megatron.studies.words import listed


@dataclass(frozen=True)
class Cost:
    """What runs take on GPUs."""

    layout: Layout
    """Of the first of them."""
    gpu_hours: float

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        layout = self.layout
        seconds, mfu = layout.step_seconds, layout.mfu
        return {"layout": layout.overrides, "step_seconds": seconds, "mfu": mfu, "gpu_hours": self.gpu_hours}


@dataclass(frozen=True)
class Costs:
    """Of the runs of a share."""

    submitted: Cost | None
    """As they will be trained; None: they cannot be."""
    why: str
    fastest: Cost | None
    """Under the fastest layouts that fit; None: the study plans its layouts, so that these are those submitted."""


@dataclass(frozen=True)
class Share:
    """What the runs of one arm and role take together."""

    arm: str
    role: str
    runs: int
    steps: int
    tokens: int
    compute: dict[str, float]
    """Of what is done, a trunk once."""
    costs: Costs | None
    """None: no GPUs are asked about."""

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        found: dict[str, Any] = {"arm": self.arm, "role": self.role, "runs": self.runs, "steps": self.steps}
        found |= {"tokens": self.tokens, "compute": self.compute}
        if self.costs is not None:
            for name, cost in (("submitted", self.costs.submitted), ("fastest", self.costs.fastest)):
                found[name] = None if cost is None else cost.as_json()
            found["why"] = self.costs.why
        return found


def shares_of(study: StudyConfig, expanded: Expanded, cluster: Cluster | None) -> list[Share]:
    """By arm and role, in order.

    Args:
        cluster: the GPUs of one run; every run is planned on as many.

    Raises:
        ConfigError, PlanError: the GPUs cannot be shared so, or nothing fits.
    """
    planner = None if cluster is None else LayoutPlanner(study, cluster)
    points = reversed(expanded.points)  # a run that several arms share counts for the first
    arm_of = {run: point.arm for point in points for run in (point.run, point.trunk, point.stage_one) if run}
    runs = [run for run in expanded.runs.values() if run.name in arm_of]
    runs.sort(key=lambda run: (list(study.arms).index(arm_of[run.name]), ("stage_one", "trunk", "run").index(run.role)))
    found = []
    for (arm, role), group in itertools.groupby(runs, key=lambda run: (arm_of[run.name], run.role)):
        members = list(group)
        found.append(
            Share(
                arm,
                role,
                len(members),
                sum(map(steps_done, members)),
                sum(tokens_of(run.config, steps_done(run)) for run in members),
                {column: sum(_done(run)[column] for run in members) for column in COLUMNS},
                None if planner is None else _costs(study, members, planner),
            )
        )
    return found


def steps_done(run: StudyRun) -> int:
    """The steps that a run does itself: a branch leaves out its trunk's."""
    return run.config.training.steps - run.begins_at


def _done(run: StudyRun) -> dict[str, float]:
    whole, before = (compute_of(run.config, steps) for steps in (run.config.training.steps, run.begins_at))
    return {column: whole[column] - before[column] for column in COLUMNS}


def _costs(study: StudyConfig, runs: Sequence[StudyRun], planner: LayoutPlanner) -> Costs:
    fastest = None if study.layouts is not None else _cost(runs, planner.fastest, planner.cluster)[0]
    try:
        submitted, fullest = _cost(runs, planner.own, planner.cluster)
    except ConfigError as error:
        return Costs(None, str(error), fastest)
    if not fullest.fits:
        needed, usable = fullest.peak / GIB, planner.cluster.usable_memory / GIB
        return Costs(None, f"needs {needed:.0f} GiB of a GPU, and {usable:.0f} GiB may be used", fastest)
    return Costs(submitted, "", fastest)


def _cost(runs: Sequence[StudyRun], layout_of: Callable[[RunConfig], Layout], cluster: Cluster) -> tuple[Cost, Layout]:
    """And the layout that takes most memory."""
    layouts = [layout_of(run.config) for run in runs]
    seconds = sum(each.step_seconds * steps_done(run) for each, run in zip(layouts, runs, strict=True))
    return Cost(layouts[0], seconds * cluster.gpus / 3600), max(layouts, key=lambda layout: layout.peak)


def rows_of(shares: list[Share], gpu: str | None) -> Iterator[list[str]]:
    """A table, headings first, with its total."""
    plans = any(share.costs is not None and share.costs.fastest is not None for share in shares)
    columns = [] if gpu is None else [f"{gpu} hours", "layout"]
    columns += ["hours of the fastest", "fastest layout"] if plans else []
    yield ["arm", "runs", "steps", "tokens", *(f"{column} EFLOPs" for column in COLUMNS), *columns]
    for share in shares:
        more = _of_gpus([share], plans)
        yield [_name(share), str(share.runs), f"{share.steps:,}", f"{share.tokens:.3g}", *_eflops(share.compute), *more]
    total = {column: sum(share.compute[column] for share in shares) for column in COLUMNS}
    steps, tokens = sum(share.steps for share in shares), sum(share.tokens for share in shares)
    runs = sum(share.runs for share in shares)
    yield ["total", str(runs), f"{steps:,}", f"{tokens:.3g}", *_eflops(total), *_of_gpus(shares, plans)]


def _of_gpus(shares: Sequence[Share], plans: bool) -> list[str]:
    """Hours and, of a single share, layouts; hours of several only where all of them have some."""
    costs = [share.costs for share in shares if share.costs is not None]
    kinds = [[each.submitted for each in costs], *([[each.fastest for each in costs]] if plans else [])]
    found = []
    for kind in kinds if costs else []:
        known = [cost for cost in kind if cost is not None]
        layouts = [" ".join(_short(cost.layout)) for cost in known] if len(shares) == 1 else []
        found += [_hours(sum(cost.gpu_hours for cost in known)) if len(known) == len(kind) else "-", *(layouts or [""])]
    return found


def reasons(shares: Sequence[Share]) -> Iterator[str]:
    """Why runs cannot be trained as they are, a line each."""
    of: dict[str, list[str]] = {}
    for share in shares:
        if share.costs is not None and share.costs.submitted is None:
            of.setdefault(share.costs.why, []).append(_name(share))
    for why, names in of.items():
        yield f"the own layout of {listed(names)} cannot be used: {why}"


def _name(share: Share) -> str:
    return share.arm if share.role == "run" else f"{share.arm} ({share.role.replace('_', ' ')})"


def _eflops(compute: dict[str, float]) -> list[str]:
    return [f"{compute[column] / 1e18:,.4g}" for column in COLUMNS]


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.2g}"


def _short(layout: Layout) -> list[str]:
    """Tensor, context, pipeline and data parallelism, ZeRO and micro-batch."""
    parallel, training = layout.config.parallel, layout.config.training
    words = [f"TP {parallel.tensor_parallel_size}"] if parallel.tensor_parallel_size > 1 else []
    words += [f"CP {parallel.context_parallel_size}"] if parallel.context_parallel_size > 1 else []
    words += [f"PP {parallel.pipeline_parallel_size}"] if parallel.pipeline_parallel_size > 1 else []
    words += [f"DP {layout.replicas}", f"ZeRO {parallel.zero_stage}", f"micro-batch {training.micro_batch_size}"]
    return words + (["recomputed"] if training.activation_checkpointing else [])
