"""One model and one global batch on several layouts, each in real processes, beside what was predicted."""

import itertools
import math
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.multiprocessing.spawn import ProcessException

from cola_megatron.config import ConfigError, RunConfig, load_config
from cola_megatron.costs.traffic import Traffic
from cola_megatron.families import family_of
from cola_megatron.planning.communication import context_traffic, data_traffic, pipeline_traffic, tensor_traffic
from cola_megatron.planning.split import pipeline_split
from cola_megatron.training.batches import micro_batches_per_step
from tools.bench_ranks import RankResult, run_ranks
from tools.communication_counter import CONTEXT, DATA, PIPELINE, TENSOR

BUBBLE_MICRO_BATCHES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Layout:
    """One way to spread the model over ranks."""

    name: str
    ranks: int
    replicas: int
    overrides: tuple[str, ...]

    @classmethod
    def parse(cls, name: str) -> "Layout":
        """`one`, or parts joined by hyphens: tp2, sp, cp2, pp2, dp2, zero1. Raises ConfigError."""
        sizes = {"tp": 1, "cp": 1, "pp": 1, "dp": 1}
        overrides = []
        for part in name.split("-") if name != "one" else []:
            found = re.fullmatch(r"(tp|cp|pp|dp|zero)([0-9]+)|sp", part)
            if found is None:
                raise ConfigError(
                    f"{name}: {part!r} is no part of a layout; there are tpN, sp, cpN, ppN, dpN and zeroN"
                )
            kind, number = found.groups()
            if kind is None:
                overrides.append("parallel.sequence_parallel=true")
            elif kind == "zero":
                overrides.append(f"parallel.zero_stage={number}")
            else:
                sizes[kind] = int(number)
        overrides += [
            f"parallel.tensor_parallel_size={sizes['tp']}",
            f"parallel.context_parallel_size={sizes['cp']}",
            f"parallel.pipeline_parallel_size={sizes['pp']}",
        ]
        return cls(name, math.prod(sizes.values()), sizes["dp"], tuple(overrides))


def predicted(config: RunConfig, replicas: int, stage: int) -> dict[str, Traffic]:
    """What a rank of a pipeline stage sends in one optimiser step, by kind of group; bytes on the wire."""
    parts, split = family_of(config).parts(config), pipeline_split(config, replicas)
    count = micro_batches_per_step(config, replicas)
    first = sum(split[:stage])
    end = first + split[stage]
    return {
        TENSOR: sum((tensor_traffic(config, part) for part in parts[first:end]), Traffic()) * count,
        CONTEXT: sum((context_traffic(config, part) for part in parts[first:end]), Traffic()) * count,
        PIPELINE: pipeline_traffic(parts, first, end) * count,
        DATA: data_traffic(config, parts[first:end], replicas, count),
    }


def run_layouts(
    layouts: Sequence[Layout], source: str, overrides: Sequence[str], warm_up: int, steps: int, rounds: int
) -> dict[str, Any]:
    """All layouts, one after the other, as often as there are rounds: what disturbs the machine disturbs all of them.

    Returns:
        for each layout its figures, or why it was left out.
    """
    found: dict[str, dict[str, Any]] = {}
    for number, layout in itertools.product(range(rounds), layouts):
        try:
            config = load_config(source, [*overrides, *layout.overrides])
            _check(config, layout)
            _say(f"{layout.name}, round {number + 1} of {rounds}")
            results = run_ranks(config, layout.ranks, warm_up, steps)
            add_run(found.setdefault(layout.name, {}), config, layout, results)
        except ConfigError as error:
            found[layout.name] = {"left_out": str(error)}
        except ProcessException as error:
            found[layout.name] = {"failed": str(error).strip().splitlines()[-1]}
    for figures in found.values():
        if "steps" in figures:
            figures["seconds"] = statistics.median(figures["steps"])
            figures["processor_seconds"] = statistics.median(figures["processor_steps"])
    one = found.get("one", {}).get("seconds")
    for figures in found.values():
        if one is not None and "seconds" in figures:
            figures["ratio"] = figures["seconds"] / one
    return found


def add_run(figures: dict[str, Any], config: RunConfig, layout: Layout, results: list[RankResult]) -> None:
    """Adds what the ranks of one run measured; bytes are the same in every round."""
    # A step is over when its last rank is done.
    slowest = [max(seconds) for seconds in zip(*(result.seconds for result in results), strict=True)]
    together = [sum(seconds) for seconds in zip(*(result.processor_seconds for result in results), strict=True)]
    figures.setdefault("steps", []).extend(slowest)
    figures.setdefault("processor_steps", []).extend(together)
    figures["processes"], figures["loss"] = layout.ranks, results[0].loss
    figures["ranks"] = []
    for result in results:
        expected = predicted(config, layout.replicas, result.stage)
        payload: dict[str, float] = defaultdict(float)
        wire: dict[str, float] = defaultdict(float)
        calls: dict[str, int] = defaultdict(int)
        for sent in result.sent:
            calls[sent.kind] += sent.calls
            payload[sent.kind] += sent.payload
            wire[sent.kind] += sent.wire
        figures["ranks"].append(
            {
                "rank": result.rank,
                "stage": result.stage,
                "payload": payload,
                "wire": wire,
                "calls": calls,
                "predicted_wire": {kind: traffic.bytes for kind, traffic in expected.items()},
                "predicted_calls": {kind: traffic.transfers for kind, traffic in expected.items()},
                "transfers": [asdict(sent) for sent in result.sent],
            }
        )


def run_bubble(source: str, overrides: Sequence[str], warm_up: int, steps: int, rounds: int) -> list[dict[str, float]]:
    """Two stages against one process over the same micro-batches: the share of the step in which a stage idles.

    Two stages that never waited would take half the time of one process with the same micro-batches; what is missing
    to that is the idle share. Predicted: (P - 1) / (m + P - 1) for equal stages; for the stages as they are, of which
    one needs more FLOPs than the other, the step takes sum(t) + (m - 1) max(t).

    Times are those of the fastest step: what else the machine does can only add to them.
    """
    one, two = Layout.parse("one"), Layout.parse("pp2")
    total = load_config(source, list(overrides)).training.global_batch_size
    rows = []
    for count in BUBBLE_MICRO_BATCHES:
        own = [*overrides, f"training.micro_batch_size={total // count}"]
        found = run_layouts([one, two], source, own, warm_up, steps, rounds)
        if any("seconds" not in figures for figures in found.values()):
            raise RuntimeError(f"no times over {count} micro-batches: {found}")
        config = load_config(source, [*own, *two.overrides])
        parts, split = family_of(config).parts(config), pipeline_split(config)
        lengths = [sum(part.flops for part in parts[: split[0]]), sum(part.flops for part in parts[split[0] :])]
        needed = sum(lengths) + (count - 1) * max(lengths)
        alone, together = (min(found[layout.name]["steps"]) for layout in (one, two))
        rows.append(
            {
                "micro_batches": count,
                "one_process": alone,
                "two_stages": together,
                "idle_share": 1 - alone / (2 * together),
                "predicted_equal_stages": 1 / (count + 1),
                "predicted_these_stages": 1 - count * sum(lengths) / (2 * needed),
            }
        )
    return rows


def _check(config: RunConfig, layout: Layout) -> None:
    """Raises ConfigError for a layout that cannot run here."""
    gpus = torch.cuda.device_count()
    if 0 < gpus < layout.ranks:
        raise ConfigError(f"{layout.ranks} ranks and {gpus} GPUs")
    micro_batches_per_step(config, layout.replicas)
    pipeline_split(config, layout.replicas)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
