"""Counts what this process hands to torch.distributed, by kind of process group.

Every collective of torch passes through torch's dispatcher as an operation of the namespace `c10d`, whoever calls it
and under whatever name a library has imported it. The counter stands there, in backward passes too, so that nothing
can be forgotten; an operation that it does not know is an error and not a gap.

Two numbers for each transfer, in bytes:

* payload: what this rank hands over. The whole tensor for an all-reduce, its own part for an all-gather, everything
  that it contributes for a reduce-scatter, the tensor for a send; nothing for a receive or a barrier.
* wire: what this rank sends where the collective is a ring over n ranks: 2 (n - 1) / n of the tensor for an
  all-reduce, (n - 1) / n of the whole (all n parts) for an all-gather, (n - 1) / n for a reduce-scatter or an
  all-to-all. What gloo or
  nccl do with a tensor is their own affair and is not seen here.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from cola_megatron.parallel import ProcessGroups
from cola_megatron.parallel.deepspeed_grid import DeepSpeedGrid

TENSOR, CONTEXT, PIPELINE, DATA, OTHER = "tensor", "context", "pipeline", "data", "other"
"""Kinds of groups; other: norms and flags over a whole replica or the whole job."""


class Transfer(NamedTuple):
    """What is counted together."""

    kind: str
    """Of the group: `TENSOR`, `CONTEXT`, `PIPELINE`, `DATA` or `OTHER`."""
    operation: str
    dtype: str


@dataclass
class Amount:
    """Of one kind of transfer."""

    calls: int = 0
    payload: float = 0.0
    """Bytes handed over."""
    wire: float = 0.0
    """Bytes sent by a ring."""


class _Operation(NamedTuple):
    name: str
    contributed: int | None
    """Index of the argument that holds what this rank contributes; None: it contributes nothing."""
    wire: Callable[[int], float]
    """Ranks -> bytes sent for each byte contributed."""


def _share(ranks: int) -> float:
    return (ranks - 1) / ranks


def _all_reduce(ranks: int) -> float:
    return 2 * _share(ranks)


def _all_gather(ranks: int) -> float:
    return ranks - 1


_OPERATIONS = {
    "allreduce_": _Operation("all-reduce", 0, _all_reduce),
    "allreduce_coalesced_": _Operation("all-reduce", 0, _all_reduce),
    "_allgather_base_": _Operation("all-gather", 1, _all_gather),
    "allgather_": _Operation("all-gather", 1, _all_gather),
    "allgather_into_tensor_coalesced_": _Operation("all-gather", 1, _all_gather),
    "_reduce_scatter_base_": _Operation("reduce-scatter", 1, _share),
    "reduce_scatter_": _Operation("reduce-scatter", 1, _share),
    "reduce_scatter_tensor_coalesced_": _Operation("reduce-scatter", 1, _share),
    "alltoall_base_": _Operation("all-to-all", 1, _share),
    "send": _Operation("send", 0, lambda ranks: 1.0),
    # One rank is the source or the target: the mean over the ranks of the group.
    "broadcast_": _Operation("broadcast", 0, _share),
    "reduce_": _Operation("reduce", 0, _share),
    "recv_": _Operation("receive", None, _share),
    "barrier": _Operation("barrier", None, _share),
}


class CommunicationCounter(TorchDispatchMode):
    """Counts while the block runs; `sent` holds what it found. Groups of one rank send nothing and are left out.

    It slows every operation down: time and count different steps.
    """

    def __init__(self, groups: ProcessGroups):
        super().__init__()
        self.sent: dict[Transfer, Amount] = defaultdict(Amount)
        self._data_ranks = dist.get_process_group_ranks(groups.same_weights_group)
        world = dist.group.WORLD
        assert world is not None, "the job was joined: there are groups"
        self._kinds = {
            groups.tensor_group.group_name: TENSOR,
            groups.context_group.group_name: CONTEXT,
            groups.pipeline_group.group_name: PIPELINE,
            groups.data_group.group_name: DATA,
            DeepSpeedGrid.get_data_parallel_group().group_name: DATA,
            groups.replica_group.group_name: OTHER,
            world.group_name: OTHER,
        }

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), named: dict | None = None) -> Any:
        if function.namespace == "c10d":
            self._count(function._schema, arguments)
        return function(*arguments, **(named or {}))

    def total(self, kind: str, *, wire: bool = False, operation: str | None = None, dtype: str | None = None) -> float:
        """Bytes of one kind of group: payload, or on the wire of a ring."""
        return sum(
            amount.wire if wire else amount.payload
            for transfer, amount in self.sent.items()
            if transfer.kind == kind and operation in (None, transfer.operation) and dtype in (None, transfer.dtype)
        )

    def _count(self, schema: Any, arguments: tuple) -> None:
        name = schema.name.removeprefix("c10d::")
        if name not in _OPERATIONS:
            raise NotImplementedError(f"{schema.name} is not counted yet")
        operation = _OPERATIONS[name]
        place = [argument.name for argument in schema.arguments].index("process_group")
        group = dist.ProcessGroup.unbox(arguments[place])
        if operation.contributed is None or group.size() == 1:
            return
        payloads: dict[str, int] = defaultdict(int)
        for tensor in _tensors(arguments[operation.contributed]):
            payloads[str(tensor.dtype).removeprefix("torch.")] += tensor.numel() * tensor.element_size()
        for dtype, payload in payloads.items():
            amount = self.sent[Transfer(self._kind(group), operation.name, dtype)]
            amount.calls += 1
            amount.payload += payload
            amount.wire += payload * operation.wire(group.size())

    def _kind(self, group: dist.ProcessGroup) -> str:
        if group.group_name not in self._kinds:
            # Libraries make groups of their own for the same ranks.
            same_ranks = dist.get_process_group_ranks(group) == self._data_ranks
            self._kinds[group.group_name] = DATA if same_ranks else OTHER
        return self._kinds[group.group_name]


def _tensors(argument: Any) -> Iterator[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        yield argument
    else:
        for part in argument:
            yield from _tensors(part)
