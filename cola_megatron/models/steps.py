"""A model as a list of steps over named tensors.

`Step("hidden, time -> hidden", run)` reads and writes names of one shared state. Run in order the list is the model.
A step that holds parameters names its `part`; the others are glue and follow what they read. Cut before steps with
parameters, the list is a pipeline (`cut_chain`): a stage takes in the names that earlier stages wrote and it or a
later one still reads, and hands on the same of its own; what follows from the batch alone every stage makes for
itself.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Step:
    """One step: `signature` is "inputs -> outputs", comma-separated names; `run` maps the one to the other.

    Args:
        part: what the step is to the cost model, such as "dit.block"; empty for glue.
        modules: the modules whose parameters the step uses; a pipeline stage holds those of its own steps.
        recompute: drop what the step would keep for its backward pass and compute it again there.

    Raises:
        ValueError: the signature is not of that form.
    """

    def __init__(
        self,
        signature: str,
        run: Callable[..., Any],
        *,
        part: str = "",
        modules: Iterable[nn.Module] = (),
        recompute: bool = False,
    ):
        sides = signature.split("->")
        if len(sides) != 2:
            raise ValueError(f"the signature of a step is 'inputs -> outputs', not {signature!r}")
        self.reads, self.writes = (tuple(name.strip() for name in side.split(",") if name.strip()) for side in sides)
        self.run, self.part, self.modules, self.recompute = run, part, tuple(modules), recompute

    @classmethod
    def idle(cls, part: str, modules: Iterable[nn.Module]) -> "Step":
        """Keeps the place of a step that has no work in a pass."""
        return cls("->", lambda: (), part=part, modules=modules)

    def __call__(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Runs on the named inputs and returns the named outputs.

        Raises:
            TypeError: `run` gave one value for several names, several for one, or another number than there are names.
            Exception: what `run` raises, with a note that says in which step.
        """
        with self._noted():
            inputs = [state[name] for name in self.reads]
        if self.recompute and torch.is_grad_enabled():
            # Nothing random happens inside a layer, so there is no generator state to keep.
            outputs: dict[str, Any] = checkpoint(self._run, *inputs, use_reentrant=False, preserve_rng_state=False)
            return outputs
        return self._run(*inputs)

    def _run(self, *inputs: Any) -> dict[str, Any]:
        with self._noted():
            return self._named(self.run(*inputs))

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        """An exception says in which step it arose, and stays what it is."""
        try:
            yield
        except Exception as error:
            error.add_note(f"in {self}")
            raise

    def _named(self, outputs: Any) -> dict[str, Any]:
        several = isinstance(outputs, tuple | list)
        if len(self.writes) == 1 and not several:
            return {self.writes[0]: outputs}
        # A tensor of two rows would unpack into two names.
        if len(self.writes) == 1 or not several or len(outputs) != len(self.writes):
            given = f"a {type(outputs).__name__}" + (f" of {len(outputs)}" if several else "")
            wanted = "one value" if len(self.writes) == 1 else f"a tuple of {len(self.writes)}"
            raise TypeError(
                f"a step that writes {', '.join(self.writes) or 'nothing'} must return {wanted}, not {given}"
            )
        return dict(zip(self.writes, outputs, strict=True))

    def __repr__(self) -> str:
        return f"Step({', '.join(self.reads)} -> {', '.join(self.writes)})"


def run_steps(steps: Iterable[Step], state: Mapping[str, Any], keep: Iterable[str] = ()) -> dict[str, Any]:
    """Runs all steps and returns the final state; names that nobody reads later are let go as soon as possible.

    Args:
        keep: names that stay although no step reads them any more.
    """
    steps, state, keep = list(steps), dict(state), set(keep)
    last_read = {name: index for index, step in enumerate(steps) for name in step.reads}
    for index, step in enumerate(steps):
        state.update(step(state))
        for name in step.reads:
            if last_read[name] == index and name not in step.writes and name not in keep:
                state.pop(name, None)
    return state


@dataclass(frozen=True)
class Stage:
    """One stage of a cut chain."""

    steps: tuple[Step, ...]
    takes: tuple[str, ...]
    """Names that arrive from the stage before."""
    hands_on: tuple[str, ...]
    """Names that go to the stage behind: its `takes`."""


def cut_chain(steps: Sequence[Step], split: Sequence[int], batch: Iterable[str]) -> list[Stage]:
    """Cuts a chain into stages.

    Args:
        split: for each stage the number of its steps with parameters.
        batch: names of the micro-batch; every stage has it, so nothing that follows from it alone crosses a cut.

    Raises:
        ValueError: the split does not add up to the steps with parameters, or leaves a stage without any.
    """
    batch, heavy = set(batch), sum(1 for step in steps if step.modules)
    if sum(split) != heavy or min(split) < 1:
        raise ValueError(f"{list(split)} must be positive and add up to the {heavy} steps with parameters")
    free = needs_batch_alone(steps, batch)
    bound = [step for step in steps if step not in free]
    free_names = batch.union(*(step.writes for step in free))
    starts = [index for index, step in enumerate(bound) if step.modules]
    firsts = [0] + [starts[sum(split[:stage])] for stage in range(1, len(split))] + [len(bound)]
    crossing = [()] + [_live_at(bound, first, free_names) for first in firsts[1:-1]] + [()]
    stages = []
    for stage in range(len(split)):
        own = bound[firsts[stage] : firsts[stage + 1]]
        own_free = steps_for(free, {name for step in own for name in step.reads}, batch)
        stages.append(Stage((*own_free, *own), crossing[stage], crossing[stage + 1]))
    return stages


def needs_batch_alone(steps: Iterable[Step], batch: Iterable[str]) -> list[Step]:
    """The steps without parameters that follow from the batch alone."""
    names, free = set(batch), []
    for step in steps:
        if not step.modules and set(step.reads) <= names:
            free.append(step)
            names |= set(step.writes)
    return free


def _live_at(steps: Sequence[Step], cut: int, free_names: set[str]) -> tuple[str, ...]:
    """Names written before step `cut` that a step from there on reads."""
    written: set[str] = {name for step in steps[:cut] for name in step.writes}
    needed: set[str] = set()
    for step in reversed(steps[cut:]):
        needed = (needed - set(step.writes)) | set(step.reads)
    return tuple(sorted((written & needed) - free_names))


def steps_for(steps: Sequence[Step], wanted: Iterable[str], given: Iterable[str]) -> list[Step]:
    """Those of the steps that lead from the given names to the wanted ones, in order."""
    given = set(given)
    needed, chosen = set(wanted) - given, []
    for step in reversed(steps):
        if needed & set(step.writes):
            needed = ((needed - set(step.writes)) | set(step.reads)) - given
            chosen.append(step)
    return chosen[::-1]
