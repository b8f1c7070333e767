"""What the picture of a pipeline shows, read off the objects that training uses.

The chain is `Cola.steps` of a preset, built without memory and cut as training cuts it; what crosses is measured on a
micro-batch that has shapes and no values; the timetable is the order in which `one_forward_one_backward` runs its
passes, each as soon as what it waits for is there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from cola_megatron.config import ColaConfig, RunConfig, load_config, require_family
from cola_megatron.families.cola.chain import Cola
from cola_megatron.families.samples import training_sample
from cola_megatron.models.pipelined import LOSS
from cola_megatron.models.steps import Stage, Step, cut_chain, run_steps
from cola_megatron.parallel import initialize_parallel
from cola_megatron.parallel.pipeline import one_forward_one_backward
from cola_megatron.planning.split import pipeline_split

BACKWARD_LENGTH = 2
"""Length of a backward pass in forward passes: two matrix products for each of the forward pass."""

_NETWORKS = {
    "vae.encoder": "encoder",
    "vae.decoder": "decoder",
    "reference": "reference",
    "dit": "DiT",
}
_LATENTS = {"latents": "latents", "two_copies": "clean | noisy copy"}


@dataclass(frozen=True)
class Box:
    """One rectangle of a stage."""

    css: str
    name: str
    detail: str = ""


@dataclass(frozen=True)
class Crossing:
    """A tensor of one micro-batch that crosses a cut."""

    name: str
    shape: tuple[int, ...]
    megabytes: float
    has_gradient: bool


@dataclass(frozen=True)
class Pass:
    """One forward or backward pass of one micro-batch through one stage, in forward passes."""

    forward: bool
    micro_batch: int
    start: int
    end: int


def stages_of_a_preset(preset: str, stages: int) -> tuple[RunConfig, Cola, list[Stage]]:
    """A stage-2 step of a preset on so many pipeline stages, without memory for its parameters."""
    config = load_config(preset, ["stage=2", f"parallel.pipeline_parallel_size={stages}"])
    groups = replace(initialize_parallel(), device=torch.device("meta"))
    with groups.device:
        model = Cola(require_family(config, ColaConfig, "the figure"), groups).to(
            torch.bfloat16 if config.training.precision == "bf16" else torch.float32
        )
    return config, model, cut_chain(model.steps(), pipeline_split(config), model.batch_names)


def crossings(config: RunConfig, stages: Sequence[Stage]) -> list[list[Crossing]]:
    """What crosses each cut, by running one micro-batch that has shapes and no values."""
    sample = training_sample(config, np.zeros(config.data.sequence_length, np.int64), -1, -1, 0, 0)
    copies = config.training.micro_batch_size
    state = {name: torch.from_numpy(np.stack([field] * copies)).to("meta") for name, field in sample.items()}
    batch, found = state, []
    for stage in stages[:-1]:
        state = run_steps(stage.steps, {**batch, **{name: state[name] for name in stage.takes}}, keep=stage.hands_on)
        found.append(
            [
                Crossing(name, tuple(state[name].shape), state[name].nbytes / 1e6, state[name].requires_grad)
                for name in stage.hands_on
            ]
        )
    return found


def crossings_by_place(preset: str) -> dict[str, list[Crossing]]:
    """What crosses a cut before each part of the chain; a part before which the same names cross is left out."""
    config, model, _ = stages_of_a_preset(preset, 2)
    steps, found = model.steps(), {}
    names: tuple[str, ...] = ()
    parts = [step.part for step in steps if step.modules]
    for cut in range(1, len(parts)):
        stages = cut_chain(steps, (cut, len(parts) - cut), model.batch_names)
        if stages[0].hands_on != names:
            names = stages[0].hands_on
            (found[parts[cut]],) = crossings(config, stages)
    return found


def boxes(stage: Stage) -> list[Box]:
    """A stage in rectangles: networks, latents, and terms of the loss, in order."""
    found = []
    for key, steps in groupby(stage.steps, key=_place):
        if key in _NETWORKS.values():
            own = list(steps)
            found.append(Box("net", key, _pieces([step.part for step in own])))
            # A cross-entropy in chunks is computed together with the head.
            found += [_term(name) for step in own for name in step.writes if name.startswith(LOSS)]
        elif key:
            found.append(_term(key) if key.startswith(LOSS) else Box("latent", key.replace("_", " ")))
    return found


def _term(name: str) -> Box:
    return Box("loss", name.removeprefix(LOSS).replace("_", " "))


def _place(step: Step) -> str:
    """The rectangle that a step belongs to; empty for what follows from the batch alone."""
    if step.part:
        return next(name for prefix, name in _NETWORKS.items() if step.part.startswith(prefix))
    written = step.writes[0]
    return written if written.startswith(LOSS) else _LATENTS.get(written, "")


def _pieces(parts: list[str]) -> str:
    """What of a network stands in a stage, as in `embed, 4 layers, head`."""
    pieces = []
    for part, same in groupby(parts):
        name, count = part.split(".")[-1], len(list(same))
        pieces.append((f"{count} layers" if count > 1 else "1 layer") if name == "block" else name)
    return "frozen encoder" if parts == ["reference"] else ", ".join(pieces)


def timetable(stages: int, micro_batches: int) -> list[list[Pass]]:
    """The passes of each stage, each as early as its order and the other stages allow."""
    orders = [_order(stage, stages, micro_batches) for stage in range(stages)]
    ends: dict[tuple[int, bool, int], int] = {}
    table: list[list[Pass]] = [[] for _ in range(stages)]
    while any(orders):
        for stage, order in enumerate(orders):
            if not order:
                continue
            forward, index = order[0]
            waits_for = [(stage - 1, True, index)] if forward else [(stage, True, index), (stage + 1, False, index)]
            waits_for = [key for key in waits_for if 0 <= key[0] < stages]
            if any(key not in ends for key in waits_for):
                continue
            free = table[stage][-1].end if table[stage] else 0
            start = max([free, *(ends[key] for key in waits_for)])
            end = ends[stage, forward, index] = start + (1 if forward else BACKWARD_LENGTH)
            table[stage].append(Pass(forward, index, start, end))
            order.pop(0)
    return table


def _order(stage: int, stages: int, micro_batches: int) -> list[tuple[bool, int]]:
    """(forward?, micro-batch) of each pass of one stage, as the schedule of training calls them."""
    order: list[tuple[bool, int]] = []

    def run(forward: bool) -> dict:
        order.append((forward, sum(1 for direction, _ in order if direction == forward)))
        return {}

    neighbours: Any = SimpleNamespace(
        groups=SimpleNamespace(pipeline_parallel_size=stages, pipeline_parallel_rank=stage),
        exchange=lambda **movements: ({}, {}),
        finish=lambda: None,
    )
    one_forward_one_backward(neighbours, micro_batches, lambda taken: run(True), lambda *pass_: run(False))
    return order


def most_in_flight(passes: Sequence[Pass]) -> int:
    """Micro-batches whose activations a stage holds at once."""
    held = [sum(1 if each.forward else -1 for each in passes[: count + 1]) for count in range(len(passes))]
    return max(held)
