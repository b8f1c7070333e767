"""What a study will take before it begins: runs, tokens, FLOPs by column; on GPUs the layout and hours of each arm."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cola_megatron.config import RunConfig
from cola_megatron.families import family_of
from cola_megatron.planning.compute import COLUMNS, compute_of, tokens_of
from cola_megatron.planning.plan import Cluster, Layout
from cola_megatron.planning.plan import plan as rank
from cola_megatron.studies.runs import Expanded, StudyRun
from cola_megatron.studies.study_file import StudyConfig


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
    layout: Layout | None
    """The fastest that fits, of the first of them; None: no GPUs are asked about."""
    gpu_hours: float | None

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "arm": self.arm,
            "role": self.role,
            "runs": self.runs,
            "steps": self.steps,
            "tokens": self.tokens,
            "compute": self.compute,
            "layout": None if self.layout is None else self.layout.overrides,
            "step_seconds": None if self.layout is None else self.layout.step_seconds,
            "mfu": None if self.layout is None else self.layout.mfu,
            "gpu_hours": self.gpu_hours,
        }


def shares_of(study: StudyConfig, expanded: Expanded, cluster: Cluster | None) -> list[Share]:
    """By arm and role, in order.

    Args:
        cluster: the GPUs of one run; every run is planned on as many.

    Raises:
        ConfigError, PlanError: the GPUs cannot be shared so, or nothing fits.
    """
    layouts: dict[str, Layout] = {}
    points = reversed(expanded.points)  # a run that several arms share counts for the first
    arm_of = {run: point.arm for point in points for run in (point.run, point.trunk, point.stage_one) if run}
    runs = [run for run in expanded.runs.values() if run.name in arm_of]
    runs.sort(key=lambda run: (list(study.arms).index(arm_of[run.name]), ("stage_one", "trunk", "run").index(run.role)))
    found = []
    for (arm, role), group in itertools.groupby(runs, key=lambda run: (arm_of[run.name], run.role)):
        members = list(group)
        hours, layout = None, None
        if cluster is not None:
            planned = [_layout(run.config, cluster, layouts) for run in members]
            seconds = sum(each.step_seconds * steps_done(run) for each, run in zip(planned, members, strict=True))
            hours, layout = seconds * cluster.gpus / 3600, planned[0]
        found.append(
            Share(
                arm,
                role,
                len(members),
                sum(map(steps_done, members)),
                sum(tokens_of(run.config, steps_done(run)) for run in members),
                {column: sum(_done(run)[column] for run in members) for column in COLUMNS},
                layout,
                hours,
            )
        )
    return found


def steps_done(run: StudyRun) -> int:
    """The steps that a run does itself: a branch leaves out its trunk's."""
    return run.config.training.steps - run.begins_at


def _done(run: StudyRun) -> dict[str, float]:
    whole, before = (compute_of(run.config, steps) for steps in (run.config.training.steps, run.begins_at))
    return {column: whole[column] - before[column] for column in COLUMNS}


def _layout(config: RunConfig, cluster: Cluster, known: dict[str, Layout]) -> Layout:
    """Runs that differ in seed, length, rate or data alone have one layout."""
    training, family = config.training, family_of(config)
    period = family.period(config)  # what is trained in it differs with the VAE's update
    key = (
        f"{family.describe(config)} {config.model!r} {training.global_batch_size} {training.precision} "
        f"{config.data.sequence_length} {compute_of(config, period)['model'] / period}"
    )
    if key not in known:
        known[key] = rank(config, cluster)[0][0]
    return known[key]


def rows_of(shares: list[Share], gpu: str | None) -> Iterator[list[str]]:
    """A table, headings first, with its total."""
    hours = [f"{gpu} hours", "layout"] if gpu is not None else []
    yield ["arm", "runs", "steps", "tokens", *(f"{column} EFLOPs" for column in COLUMNS), *hours]
    for share in shares:
        name = share.arm if share.role == "run" else f"{share.arm}, {share.role.replace('_', ' ')}"
        more = []
        if share.layout is not None and share.gpu_hours is not None:
            more = [_hours(share.gpu_hours), " ".join(_short(share.layout))]
        yield [name, str(share.runs), f"{share.steps:,}", f"{share.tokens:.3g}", *_eflops(share.compute), *more]
    total = {column: sum(share.compute[column] for share in shares) for column in COLUMNS}
    steps, tokens = sum(share.steps for share in shares), sum(share.tokens for share in shares)
    more = [_hours(sum(share.gpu_hours or 0.0 for share in shares)), ""] if gpu is not None else []
    runs = sum(share.runs for share in shares)
    yield ["total", str(runs), f"{steps:,}", f"{tokens:.3g}", *_eflops(total), *more]


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
