"""Where the time of an optimiser step goes: every operation, forward and backward, is given to a part of the chain.

Parts are those of the model's steps; glue belongs to the part whose output it reads last. Inside a block that is not
compiled, attention and feed-forward are told from the rest. The forward pass runs inside named ranges of the profiler.
The backward pass of an operation has its sequence number, and so the same part. Gradients that autograd sums, and what
DeepSpeed does with them, are `optimizer.gradients`.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import record_function

from cola_megatron.models.steps import Step
from cola_megatron.training.engine import Engine

PREFIX = "part: "
BRANCHES = {"attention": "attention", "ffn": "feed_forward"}
"""Modules of a block that are parts of their own, with their names in the table; the others are its `rest`."""
REST = "rest"
COMMUNICATION = ("c10d::", "nccl:", "gloo:", "ncclDevKernel", "ncclKernel")
BACKWARD = "autograd::engine::evaluate_function"


@dataclass
class PartTime:
    """Seconds."""

    host: float = 0.0
    """Of the host's threads: launching, or computing where there is no GPU."""
    device: float = 0.0
    """Of kernels and copies."""


def labels_of(steps: Sequence[Step]) -> list[str]:
    """The part of each step; `batch` is what follows from the batch alone."""
    part_of: dict[str, int] = {}
    labels: list[str] = []
    for index, step in enumerate(steps):
        sources = [part_of[name] for name in step.reads if name in part_of]
        label = step.part or (labels[max(sources)] if sources else "batch")
        labels.append(label)
        for name in step.writes:
            part_of.pop(name, None)
            if label != "batch":
                part_of[name] = index
    return labels


@contextlib.contextmanager
def marked(engine: Engine, **mode: bool) -> Iterator[None]:
    """While it is open, the steps of `engine` tell the profiler their parts."""
    with contextlib.ExitStack() as stack:
        steps = engine.model.stage(**mode).steps
        for step, label in zip(steps, labels_of(steps), strict=True):
            branches = list(_branches(step.modules))
            stack.enter_context(_ranged(step, "run", f"{label}.{REST}" if branches else label))
            for name, module in branches:
                stack.enter_context(_ranged(module, "forward", f"{label}.{name}"))
        stack.enter_context(_ranged(engine.deepspeed, "backward", "optimizer.gradients"))
        stack.enter_context(_ranged(engine.deepspeed, "step", "optimizer.update"))
        yield


def marked_batches(batches: Iterable[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """The same batches, whose making is the part `data`."""
    source = iter(batches)
    while True:
        with record_function(f"{PREFIX}data"):
            batch = next(source, None)
        if batch is None:
            return
        yield batch


def _branches(modules: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    for module in modules:
        if getattr(module, "_compiled_call_impl", None) is not None:
            continue  # compiled code knows no ranges
        for name, label in BRANCHES.items():
            branch = getattr(module, name, None)
            if isinstance(branch, nn.Module):
                yield label, branch


@contextlib.contextmanager
def _ranged(owner: Any, name: str, label: str) -> Iterator[None]:
    """Runs a method, or a function held as an attribute, inside a range of the profiler."""
    own = vars(owner).get(name)
    original = getattr(owner, name)

    @functools.wraps(original)
    def run(*arguments: Any, **options: Any) -> Any:
        with record_function(PREFIX + label):
            return original(*arguments, **options)

    setattr(owner, name, run)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def time_by_part(events: Iterable[Any]) -> dict[str, PartTime]:
    """Seconds of each part, from the events of torch's profiler; `other` is what belongs to none."""
    events = [event for event in events if event.device_type == DeviceType.CPU]
    find = _part_finder(events)
    times: dict[str, PartTime] = defaultdict(PartTime)
    for event in events:
        label = find(event)
        if not event.is_async:
            times[label].host += event.self_cpu_time_total / 1e6
        for kernel in event.kernels:
            if kernel.name.startswith(PREFIX):
                continue  # the range itself, as the device's side of the profiler shows it
            at = "communication" if kernel.name.startswith(COMMUNICATION) else label
            times[at].device += kernel.duration / 1e6
    return dict(times)


def busy_seconds(events: Iterable[Any]) -> float:
    """Seconds in which the device had something to do, however many kernels at once."""
    ranges = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type != DeviceType.CPU and not event.name.startswith(PREFIX) and not event.is_user_annotation
    )
    busy, until = 0.0, float("-inf")
    for start, end in ranges:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / 1e6


def _part_finder(events: Sequence[Any]) -> Callable[[Any], str]:
    """Maps an event to its part: that of the range around it, or of the operation whose backward pass it is in."""
    forward: dict[tuple[int, int], Any] = {}
    for event in events:
        # Operations without a gradient have the number of the next that has one: the last one made the node.
        if event.sequence_nr >= 0 and event.scope == 0 and not event.name.startswith(BACKWARD):
            key = (event.thread, event.sequence_nr)
            if key not in forward or event.time_range.start >= forward[key].time_range.start:
                forward[key] = event

    found: dict[int, str] = {}

    def find(event: Any) -> str:
        if id(event) not in found:
            found[id(event)] = _find(event)
        return found[id(event)]

    def _find(event: Any) -> str:
        if event.name.startswith(COMMUNICATION):
            return "communication"
        if event.name.startswith(PREFIX):
            return event.name.removeprefix(PREFIX)
        if event.name.startswith(BACKWARD):
            made_by = forward.get((event.fwd_thread, event.sequence_nr))
            return find(made_by) if made_by is not None else "optimizer.gradients"
        return "other" if event.cpu_parent is None else find(event.cpu_parent)

    return find
