"""A model as a list of steps over named tensors.

`Step("hidden, time -> hidden", run)` reads and writes names of one shared state. Run in order the list is the model;
cut anywhere it is a pipeline whose stages pass on exactly the names that are still read later (`live_at`).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


class Step:
    """One step: `signature` is "inputs -> outputs", comma-separated names; `run` maps the one to the other.

    Args:
        recompute: drop what the step would keep for its backward pass and compute it again there.
    """

    def __init__(self, signature: str, run: Callable, *, recompute: bool = False):
        reads, _, writes = signature.partition("->")
        self.reads = tuple(name.strip() for name in reads.split(",") if name.strip())
        self.writes = tuple(name.strip() for name in writes.split(",") if name.strip())
        self.run, self.recompute = run, recompute

    def __call__(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Runs on the named inputs and returns the named outputs."""
        inputs = [state[name] for name in self.reads]
        if self.recompute and torch.is_grad_enabled():
            # Nothing random happens inside a layer, so there is no generator state to keep.
            outputs = checkpoint(self.run, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            outputs = self.run(*inputs)
        if len(self.writes) == 1:
            outputs = (outputs,)
        return dict(zip(self.writes, outputs, strict=True))

    def __repr__(self) -> str:
        return f"Step({', '.join(self.reads)} -> {', '.join(self.writes)})"


def run_steps(steps: Iterable[Step], state: Mapping[str, Any]) -> dict[str, Any]:
    """Runs all steps and returns the final state; names that nobody reads later are let go as soon as possible."""
    steps, state = list(steps), dict(state)
    last_read = {name: index for index, step in enumerate(steps) for name in step.reads}
    for index, step in enumerate(steps):
        state.update(step(state))
        for name in step.reads:
            if last_read[name] == index and name not in step.writes:
                del state[name]
    return state


def live_at(steps: Iterable[Step], cut: int, outputs: Iterable[str]) -> tuple[str, ...]:
    """Names that must cross a cut before step `cut`: written before it, and read after it or wanted at the end."""
    steps = list(steps)
    written = {name for step in steps[:cut] for name in step.writes}
    wanted, needed = set(outputs), set()
    for step in reversed(steps[cut:]):
        needed = (needed - set(step.writes)) | set(step.reads)
        wanted -= set(step.writes)
    return tuple(sorted(written & (needed | wanted)))
