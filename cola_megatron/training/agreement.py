"""How the ranks act as one: what one of them knows, all must act upon at the same step, or none."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from cola_megatron.parallel import ProcessGroups
from cola_megatron.training.sharded_tensors import CheckpointError

T = TypeVar("T")


class Speaker(Protocol):
    """Somebody on every rank who knows something that all ranks must act upon."""

    def says(self) -> Sequence[bool]:
        """What this rank knows; always as many flags. Must not communicate."""

    def hears(self, said: Sequence[bool]) -> None:
        """For each flag whether any rank raised it; all ranks hear the same at the same step."""


class Agreement:
    """One small collective after every step, in which all speakers of all ranks are heard."""

    def __init__(self, groups: ProcessGroups, *speakers: Speaker):
        self.groups, self.speakers = groups, speakers

    def reach(self) -> None:
        """Lets every speaker hear what was said anywhere; all ranks call it. Raises what the speakers raise."""
        said = [speaker.says() for speaker in self.speakers]
        answers = iter(any_rank(self.groups, [flag for flags in said for flag in flags]))
        heard = [[next(answers) for _ in flags] for flags in said]
        for speaker, flags in zip(self.speakers, heard, strict=True):
            speaker.hears(flags)


def any_rank(groups: ProcessGroups, flags: Sequence[bool]) -> list[bool]:
    """For each flag whether any rank raised it (a collective)."""
    if groups.world_size == 1:
        return list(flags)
    raised = torch.tensor(list(flags), dtype=torch.float32, device=groups.device)
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return [bool(flag) for flag in raised.tolist()]


def together(groups: ProcessGroups, work: Callable[[], T] | None) -> list[T]:
    """Runs `work` on every rank (None: nothing to do on this one); all ranks call it.

    Returns:
        the results of all ranks, on the main process; elsewhere nothing.

    Raises:
        CheckpointError: the first rank's, where ranks raised some: the same one, of the same class, on every rank.
        Exception: what else `work` raised; on the other ranks a CheckpointError with the same message.
    """
    result = failure = None
    try:
        result = work() if work is not None else None
    except Exception as error:  # raised again below, when all ranks know of it
        failure = error
    told = failure
    if failure is not None and not isinstance(failure, CheckpointError):
        told = CheckpointError((str(failure) or type(failure).__name__).splitlines()[0])
    answers = [None] * groups.world_size if groups.is_main else None
    dist.gather_object((result, told), answers)
    first = [next((told for _, told in answers if told is not None), None)] if groups.is_main else [None]
    dist.broadcast_object_list(first)
    if failure is not None and told is not failure:
        raise failure
    if first[0] is not None:
        raise first[0]
    return [result for result, _ in answers] if groups.is_main else []


def from_main(groups: ProcessGroups, work: Callable[[], T]) -> T:
    """What `work` returns on the main process, on every rank; raises like `together`."""
    answer = together(groups, work if groups.is_main else None)[:1] or [None]
    dist.broadcast_object_list(answer)
    return answer[0]
