"""Where the time of an optimiser step goes, part by part, each beside the least that it can take.

    python -m tools.bench_step paper-2b --trace step.json.gz            on a GPU
    python -m tools.bench_step paper-2b training.compile_blocks=never   with blocks told apart into their branches
    python -m tools.bench_step tiny                                     on a CPU
    python -m tools.bench_step tiny-autoregressive                      another family
    torchrun --nproc-per-node 8 -m tools.bench_step base --json         the busiest rank speaks

Weights and tokens are random. The step has as many micro-batches as `--micro-batches` says, whatever the config's
global batch. It is timed without the profiler first; `idle` is what of that time the device had nothing to do.
The trace is opened with https://ui.perfetto.dev or chrome://tracing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from cola_megatron.config import RunConfig, load_config
from cola_megatron.families import family_of
from cola_megatron.parallel import ProcessGroups
from cola_megatron.planning.flops import training_flops_per_sample
from cola_megatron.records.provenance import versions
from cola_megatron.training.batches import MicroBatches
from cola_megatron.training.build_model import initialize_run
from cola_megatron.training.engine import Engine
from tools.bench_ranks import RandomSamples
from tools.gpu_setting import machine, random_model
from tools.step_floors import Floor, Rates, floors, measure_rates
from tools.step_profile import PartTime, busy_seconds, marked, marked_batches, time_by_part


@dataclass(frozen=True)
class Row:
    """A part, or a group of parts, in one optimiser step of one rank."""

    part: str
    seconds: float
    """On the device; on a CPU, of the host."""
    host: float
    floor: Floor
    """Zero where none is counted."""

    @property
    def times_floor(self) -> float | None:
        """How many times the floor the part takes."""
        least = self.floor.products + self.floor.bytes
        return self.seconds / least if least else None


@dataclass(frozen=True)
class Answer:
    """One rank's step."""

    rank: int
    step: float
    """Seconds, median, without the profiler."""
    profiled: float
    """Seconds with it."""
    idle: float | None
    """Seconds of `step` in which the device had nothing to do; None on a CPU."""
    model_flops: float
    """Per second, over all ranks and per rank."""
    rates: Rates
    rows: list[Row]


def main(arguments: list[str] | None = None) -> None:
    """Prints a table, or with --json one object."""
    options = parse(arguments)
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = load_config(options.config, options.overrides)
        groups = initialize_run(config)
        config = with_micro_batches(config, options.micro_batches, groups.data_parallel_size)
        answer = busiest(groups, measure(config, groups, options.steps, options.trace))
    if not groups.is_main:
        return
    if options.json:
        about = {"machine": machine(groups.device.type), "versions": versions(), "ranks": groups.world_size}
        print(json.dumps({**about, **as_tree(answer)}, indent=1))
    else:
        print(table(answer, config, groups))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options; exits with 2 for a wrong use."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="preset or file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--micro-batches", type=int, default=2, help="of each replica in a step (default 2)")
    parser.add_argument("--steps", type=int, default=3, help="that are timed before one is profiled (default 3)")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="write the profiled step of rank 0 (.json, .json.gz)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_intermixed_args(arguments)


def with_micro_batches(config: RunConfig, count: int, replicas: int) -> RunConfig:
    """The config with a step of so many micro-batches, and without warm-up."""
    training = config.training
    schedule = training.schedule.model_copy(update={"warmup_steps": 0})
    size = count * training.micro_batch_size * replicas
    changed = training.model_copy(update={"global_batch_size": size, "schedule": schedule})
    return config.model_copy(update={"training": changed})


def measure(config: RunConfig, groups: ProcessGroups, steps: int, trace: Path | None) -> Answer:
    """This rank's step; all ranks call it."""
    rates = measure_rates(config, groups)
    engine = Engine(random_model(config, groups), config, groups)
    batches = random_batches(config, groups)
    for step in range(2):  # compiles, sets up libraries, makes AdamW's moments
        engine.step(batches, step)
    seconds = [timed(engine, batches, 2 + step) for step in range(steps)]
    mode = family_of(config).mode_at(config, 2 + steps)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if groups.device.type == "cuda" else [])
    with profile(activities=activities) as profiler, marked(engine, **mode):
        profiled = timed(engine, marked_batches(batches), 2 + steps)
    if trace is not None and groups.is_main:
        profiler.export_chrome_trace(str(trace))
    events, step_seconds = profiler.events(), statistics.median(seconds)
    on_gpu = groups.device.type == "cuda"
    samples = config.training.global_batch_size
    return Answer(
        rank=groups.rank,
        step=step_seconds,
        profiled=profiled,
        idle=max(0.0, step_seconds - busy_seconds(events)) if on_gpu else None,
        model_flops=samples * training_flops_per_sample(config) / step_seconds / groups.world_size,
        rates=rates,
        rows=rows_of(time_by_part(events), floors(config, groups, rates), on_gpu),
    )


def random_batches(config: RunConfig, groups: ProcessGroups) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of random tokens, made when they are asked for: training has processes that do so ahead."""
    batches = MicroBatches(config, RandomSamples(config), groups.data_parallel_rank, groups.data_parallel_size)
    for index in range(len(batches)):
        yield {name: tensor.to(groups.device) for name, tensor in batches[index].tensors.items()}


def timed(engine: Engine, batches: Iterator[dict[str, torch.Tensor]], step: int) -> float:
    """Seconds of one step."""
    engine.groups.barrier()
    began = time.perf_counter()
    engine.step(batches, step)
    if engine.groups.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def rows_of(times: dict[str, PartTime], floor: dict[str, Floor], on_gpu: bool) -> list[Row]:
    """A row for each part in the order in which they first ran; before those of a block or the optimiser their sum."""
    groups: dict[str, list[str]] = {}
    for label in times:
        groups.setdefault(group_of(label), []).append(label)

    def row(label: str, members: list[str]) -> Row:
        host, device = (sum(getattr(times[name], kind) for name in members) for kind in ("host", "device"))
        return Row(label, device if on_gpu else host, host, floor.get(label, Floor()))

    rows: list[Row] = []
    for group, members in groups.items():
        rows.append(row(group, members))
        if members != [group]:
            rows += [row(name, [name]) for name in members]
    return rows


def group_of(label: str) -> str:
    """`dit.block` of `dit.block.attention`, `optimizer` of `optimizer.update`; others are groups of their own."""
    if label.startswith("optimizer."):
        return "optimizer"
    head, dot, _ = label.partition(".block.")
    return f"{head}.block" if dot else label


def busiest(groups: ProcessGroups, answer: Answer) -> Answer:
    """The answer of the rank whose parts took longest together, on every rank."""
    if groups.world_size == 1:
        return answer
    answers: list[Any] = [None] * groups.world_size
    dist.all_gather_object(answers, answer)
    return max(answers, key=total)


def total(answer: Answer) -> float:
    """Seconds of all parts together."""
    return sum(row.seconds for row in answer.rows if group_of(row.part) == row.part)


def as_tree(answer: Answer) -> dict[str, Any]:
    """For JSON."""
    rows = [{**vars(row), "floor": vars(row.floor), "times_floor": row.times_floor} for row in answer.rows]
    return {**vars(answer), "rates": vars(answer.rates), "rows": rows}


def table(answer: Answer, config: RunConfig, groups: ProcessGroups) -> str:
    """For people."""
    training, rates = config.training, answer.rates
    count = training.global_batch_size // training.micro_batch_size // groups.data_parallel_size
    link = "" if rates.link is None else f", all-reduce {rates.link / 1e9:.4g} GB/s"
    lines = [
        f"{config.name}, {family_of(config).describe(config)}, {training.precision}, {count} micro-batches of "
        f"{training.micro_batch_size} sequences, ZeRO {config.parallel.zero_stage}, {groups.world_size} ranks",
        f"measured: product {rates.product / 1e12:.4g} TFLOP/s, copy {rates.copy / 1e9:.4g} GB/s{link}",
        f"step {answer.step * 1e3:.2f} ms ({answer.model_flops / 1e12:.4g} TFLOP/s of model FLOPs a rank), with the "
        f"profiler {answer.profiled * 1e3:.2f} ms",
        "",
        f"{'part':<34}{'ms':>10}{'share':>8}{'host ms':>10}{'products':>10}{'bytes':>10}{'x floor':>9}",
    ]
    everything = total(answer)
    for row in answer.rows:
        indent = "" if group_of(row.part) == row.part else "  "
        least = (row.floor.products, row.floor.bytes)
        floor = "".join(f"{f'{part * 1e3:.2f}' if part else '-':>10}" for part in least)
        times = "-" if row.times_floor is None else f"{row.times_floor:.1f}"
        lines.append(
            f"{indent + row.part:<34}{row.seconds * 1e3:>10.2f}{row.seconds / everything:>8.1%}"
            f"{row.host * 1e3:>10.2f}{floor}{times:>9}"
        )
    lines.append(f"{'all parts':<34}{everything * 1e3:>10.2f}")
    if answer.idle is not None:
        lines.append(f"{'idle':<34}{answer.idle * 1e3:>10.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
