"""How the ranks act as one: what one of them knows, all must act upon at the same step, or none."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from cola_megatron.errors import UserError
from cola_megatron.parallel.groups import ProcessGroups

T = TypeVar("T")


class RankFailed(UserError, RuntimeError):
    """What another rank's unforeseen error becomes on this one: its first line."""


class Participant(Protocol):
    """Somebody on every rank who knows something that all ranks must act upon."""

    def flags(self) -> Sequence[bool]:
        """What this rank knows; always as many flags. Must not communicate."""

    def on_consensus(self, raised: Sequence[bool]) -> None:
        """For each flag whether any rank raised it; called with the same on all ranks, at the same step."""


class StepConsensus:
    """One small all-reduce after every step, over the flags of all participants of all ranks."""

    def __init__(self, groups: ProcessGroups, *participants: Participant):
        self.groups, self.participants = groups, participants

    def reach(self) -> None:
        """Tells every participant what was raised anywhere; all ranks call it. Raises what the participants raise."""
        flags = [participant.flags() for participant in self.participants]
        raised = iter(any_rank(self.groups, [flag for each in flags for flag in each]))
        answers = [[next(raised) for _ in each] for each in flags]
        for participant, answer in zip(self.participants, answers, strict=True):
            participant.on_consensus(answer)


def any_rank(groups: ProcessGroups, flags: Sequence[bool]) -> list[bool]:
    """For each flag whether any rank raised it (an all-reduce)."""
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
        UserError: the first rank's, where ranks raised some: the same one, of the same class, on every rank.
        Exception: what else `work` raised; on the other ranks a RankFailed with the same message.
    """
    result = failure = None
    try:
        result = work() if work is not None else None
    except Exception as error:  # raised again below, when all ranks know of it
        failure = error
    told = failure
    if failure is not None and not isinstance(failure, UserError):
        told = RankFailed((str(failure) or type(failure).__name__).splitlines()[0])
    # Empty but on the main process, where `gather_object` fills it.
    answers: list[Any] = [None] * groups.world_size if groups.is_main else []
    dist.gather_object((result, told), answers if groups.is_main else None)
    first = [next((told for _, told in answers if told is not None), None)]
    dist.broadcast_object_list(first)
    if failure is not None and told is not failure:
        raise failure
    if first[0] is not None:
        raise first[0]
    return [result for result, _ in answers]


def from_main(groups: ProcessGroups, work: Callable[[], T]) -> T:
    """What `work` returns on the main process, on every rank; raises like `together`."""
    answer: list[Any] = together(groups, work if groups.is_main else None)[:1] or [None]
    dist.broadcast_object_list(answer)
    return answer[0]
