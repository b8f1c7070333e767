"""Whole matrices out of the ranges and cuts that ZeRO and tensor parallelism leave on each rank, and back.

ZeRO gives each rank of `same_weights_group` a range of a flattened parameter. One of them, the rank with most of it,
gets what the others hold, computes, and sends their ranges back: under ZeRO 1 and 2 most matrices lie whole on one
rank, and are not sent at all. Ranks that all hold the whole compute it each for itself. Under tensor parallelism the
ranks of a tensor group, which hold cuts of one matrix, gather it and compute the same.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from cola_megatron.parallel.groups import ProcessGroups

Function = Callable[[torch.Tensor, Sequence[int] | None], torch.Tensor]
"""(matrix, its fused rows) -> a matrix of the same shape."""


class HeldMatrix(NamedTuple):
    """What this rank holds of a matrix in a flat tensor."""

    shape: tuple[int, ...]
    """Of its cut by tensor parallelism."""
    partition_dim: int | None
    fused_rows: tuple[int, ...] | None
    start: int
    """First element of its range in the flattened cut."""
    length: int
    """0: nothing."""
    flat_start: int
    """Where the range begins in the flat tensor."""


class MatrixExchange:
    """The matrices of one flat tensor, the same ones in the same order on every rank of its `same_weights_group`.

    The constructor is a collective of that group, unless `everywhere`.

    Args:
        everywhere: every rank of the group holds whole matrices.
    """

    def __init__(self, matrices: Sequence[HeldMatrix], groups: ProcessGroups, everywhere: bool = False):
        self.groups = groups
        self._me, ranks = groups.same_weights_rank, groups.same_weights_size
        ranges = [[(matrix.start, matrix.length) for matrix in matrices]]
        ranges *= ranks
        if ranks > 1 and not everywhere:
            dist.all_gather_object(ranges, ranges[0], group=groups.same_weights_group)
        shared = [_Shared(matrix, tuple(of_rank[index] for of_rank in ranges)) for index, matrix in enumerate(matrices)]
        self._everywhere = [each for each in shared if each.is_everywhere]
        self._rounds = _rounds([each for each in shared if not each.is_everywhere], ranks)

    def updates(
        self, flat_N: torch.Tensor, dtype: torch.dtype, function: Function
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(start in the flat tensor, values) of this rank's ranges of `function` of each whole matrix.

        Each group member must go through all of them: they are collectives.

        Args:
            dtype: what matrices are sent, and given to the function, in.
        """
        for shared in self._everywhere:
            yield shared.held.flat_start, self._computed(shared, shared.own(flat_N).to(dtype), function)
        for matrices in self._rounds:
            yield from self._round(matrices, flat_N, dtype, function)

    def _round(
        self, matrices: dict[int, "_Shared"], flat_N: torch.Tensor, dtype: torch.dtype, function: Function
    ) -> Iterator[tuple[int, torch.Tensor]]:
        mine = matrices.get(self._me)
        if not any(shared.is_split for shared in matrices.values()):
            if mine is not None:
                yield mine.held.flat_start, self._computed(mine, mine.own(flat_N).to(dtype), function)
            return
        ranks = range(self.groups.same_weights_size)
        here = [matrices[rank].held.length if rank in matrices else 0 for rank in ranks]
        there = [mine.ranges[rank][1] if mine is not None else 0 for rank in ranks]
        sent = torch.cat([matrices[rank].own(flat_N) for rank in ranks if rank in matrices])
        received = self._exchanged(sent.to(self.groups.device, dtype), here, there)
        result = received
        if mine is not None:
            whole = torch.empty_like(received)
            for (start, length), values in zip(mine.ranges, received.split(there), strict=True):
                whole.narrow(0, start, length).copy_(values)
            computed = self._computed(mine, whole, function)
            result = torch.cat([computed.narrow(0, start, length) for start, length in mine.ranges])
        returned = self._exchanged(result, there, here).split(here)
        for rank in ranks:
            if here[rank]:
                yield matrices[rank].held.flat_start, returned[rank]

    def _computed(self, shared: "_Shared", cut_N: torch.Tensor, function: Function) -> torch.Tensor:
        """The function of the whole matrix of which a flattened cut is given; the cut of its value, flattened."""
        held, groups = shared.held, self.groups
        cut = cut_N.to(groups.device).view(held.shape)
        if held.partition_dim is None or groups.tensor_parallel_size == 1:
            return function(cut, held.fused_rows).reshape(-1)
        cuts = [torch.empty_like(cut) for _ in range(groups.tensor_parallel_size)]
        dist.all_gather(cuts, cut.contiguous(), group=groups.tensor_group)
        value = function(torch.cat(cuts, dim=held.partition_dim), held.fused_rows)
        return value.chunk(groups.tensor_parallel_size, held.partition_dim)[groups.tensor_parallel_rank].reshape(-1)

    def _exchanged(self, values_N: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
        size = values_N.element_size()
        received = values_N.new_empty(sum(receive))
        dist.all_to_all_single(
            received.view(torch.uint8),  # which every backend sends
            values_N.contiguous().view(torch.uint8),
            [size * count for count in receive],
            [size * count for count in send],
            group=self.groups.same_weights_group,
        )
        return received


class _Shared(NamedTuple):
    held: HeldMatrix
    ranges: tuple[tuple[int, int], ...]
    """(start, length) on each rank of `same_weights_group`."""

    @property
    def size(self) -> int:
        return math.prod(self.held.shape)

    @property
    def is_everywhere(self) -> bool:
        return all(length == self.size for _, length in self.ranges)

    @property
    def is_split(self) -> bool:
        return all(length < self.size for _, length in self.ranges)

    def own(self, flat_N: torch.Tensor) -> torch.Tensor:
        return flat_N.narrow(0, self.held.flat_start, self.held.length)


def _rounds(matrices: Sequence[_Shared], ranks: int) -> list[dict[int, _Shared]]:
    """Who computes which matrix when: by rank, at most one for each in a round; split ones come first."""
    queues: list[list[_Shared]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for shared in sorted(matrices, key=lambda each: not each.is_split):
        lengths = [length for _, length in shared.ranges]
        owner = min((rank for rank in range(ranks) if lengths[rank] == max(lengths)), key=loads.__getitem__)
        queues[owner].append(shared)
        loads[owner] += shared.size
    return [
        {rank: queue[index] for rank, queue in enumerate(queues) if index < len(queue)}
        for index in range(max(map(len, queues), default=0))
    ]
