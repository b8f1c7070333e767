"""What a chain must fulfil before it is run: a misspelt name is found where it stands, not where it is missed."""

from collections.abc import Collection, Sequence
from difflib import get_close_matches

from cola_megatron.models.steps import Step, needs_batch_alone


def check_chain(steps: Sequence[Step], batch: Collection[str], results: Collection[str]) -> None:
    """Every name that is read is there, and what a step writes is used.

    A step that follows from the batch alone may be there for nobody: a stage makes what it needs of these.

    Args:
        batch: names of the micro-batch.
        results: names for which the chain is run.

    Raises:
        ValueError: a step reads what is not there before it; a result is not written; nobody reads what a step writes
            before it is written anew. The message names step and name.
    """
    there = set(batch)
    for step in steps:
        for name in step.reads:
            if name not in there:
                missing = f"{name!r}, which is not in the batch and which no step before it writes"
                raise ValueError(f"{step} reads {missing}{_near(name, there)}")
        there |= set(step.writes)
    for name in results:
        if not any(name in step.writes for step in steps):
            raise ValueError(f"no step writes {name!r}, for which the chain is run{_near(name, there)}")
    free = needs_batch_alone(steps, batch)
    for index, step in enumerate(steps):
        needed = not step.writes or any(_is_used(name, steps[index + 1 :], results) for name in step.writes)
        if not needed and step not in free:
            raise ValueError(f"nobody reads what {step} writes")


def _is_used(name: str, later: Sequence[Step], results: Collection[str]) -> bool:
    """Whether a name is read by one of the later steps before it is written anew, or is left as a result."""
    for step in later:
        if name in step.reads:
            return True
        if name in step.writes:
            return False
    return name in results


def _near(name: str, names: Collection[str]) -> str:
    close = get_close_matches(name, sorted(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
