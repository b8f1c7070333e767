"""The pipeline: named tensors between neighbouring stages, and the order of forward and backward passes.

One-forward-one-backward: stage r of P runs P - 1 - r forward passes ahead, then alternates, then drains; it never
holds more than P - r micro-batches. With one stage that is the plain loop of gradient accumulation, and the same
code.

What crosses a cut is whatever the chain says (hidden states, thin latents, tables of times): each name is a tensor
of its own, and only those that carry a gradient get one back.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cola_megatron.parallel.groups import ProcessGroups

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Form:
    """What a receiver must know of a tensor before it comes."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool

    def empty(self, device: torch.device) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=device)


class Neighbours:
    """Sends and receives between this stage and those before and behind it, for passes of one form.

    The form (names, shapes, types) travels once, ahead of the first tensors. With one stage nothing is sent at all.

    Args:
        takes: names that come from the stage before.
        hands_on: names that go to the stage behind.
    """

    def __init__(self, groups: ProcessGroups, takes: tuple[str, ...], hands_on: tuple[str, ...]):
        self.groups, self.takes, self.hands_on = groups, takes, hands_on
        ranks = dist.get_process_group_ranks(groups.pipeline_group)
        stage = groups.pipeline_parallel_rank
        self.before = ranks[stage - 1] if takes else None
        self.behind = ranks[stage + 1] if hands_on else None
        self.forms_taken: dict[str, _Form] | None = None
        self.forms_handed_on: dict[str, _Form] | None = None
        self._sending: list[tuple[dist.Work, list[torch.Tensor]]] = []

    def exchange(
        self,
        hand_on: Tensors | None = None,
        give_back: Tensors | None = None,
        take: bool = False,
        get_back: bool = False,
    ) -> tuple[Tensors, Tensors]:
        """Any of the four movements at once, so that two stages that face each other never wait in a circle.

        Args:
            hand_on: outputs for the stage behind.
            give_back: gradients of its outputs for the stage before.
            take: receive the next outputs of the stage before.
            get_back: receive gradients of the oldest outputs whose gradients are still out.

        Returns:
            what was taken, and what was got back.
        """
        if hand_on and self.forms_handed_on is None:
            self.forms_handed_on = {
                name: _Form(tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in hand_on.items()
            }
            self._announce(self.forms_handed_on)
        if take and self.takes and self.forms_taken is None:
            self.forms_taken = self._hear()
        taken = self._space(self.forms_taken, self.takes) if take else {}
        got_back = self._space(self.forms_handed_on, self._differentiable(self.forms_handed_on)) if get_back else {}
        sends = [(tensor.detach().contiguous(), self.behind) for _, tensor in sorted((hand_on or {}).items())]
        sends += [(tensor.contiguous(), self.before) for _, tensor in sorted((give_back or {}).items())]
        operations = [dist.P2POp(dist.isend, tensor, peer, self.groups.pipeline_group) for tensor, peer in sends]
        for space, peer in ((taken, self.before), (got_back, self.behind)):
            operations += [
                dist.P2POp(dist.irecv, tensor, peer, self.groups.pipeline_group) for _, tensor in sorted(space.items())
            ]
        if operations:
            works = dist.batch_isend_irecv(operations)
            self._wait(works, [tensor for tensor, _ in sends], receives=len(operations) - len(sends))
        for name, tensor in taken.items():
            tensor.requires_grad_((self.forms_taken or {})[name].requires_grad)
        return taken, got_back

    def finish(self) -> None:
        """Waits until everything that was sent has left."""
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()

    def _wait(self, works: list[dist.Work], sends: list[torch.Tensor], receives: int) -> None:
        """Waits for what comes; what only leaves is held until it has left.

        gloo answers with one work for each operation, in order; nccl with one for all of them, and waiting for it
        holds up its stream and not the processor.
        """
        self._sending = [(work, tensors) for work, tensors in self._sending if not work.is_completed()]
        if len(works) == len(sends) + receives:
            self._sending += [(work, [tensor]) for work, tensor in zip(works, sends, strict=False)]
            works = works[len(sends) :]
        elif not receives:
            self._sending += [(work, sends) for work in works]
            works = []
        for work in works:
            work.wait()

    def _announce(self, forms: dict[str, _Form]) -> None:
        dist.send_object_list(
            [forms], self.behind, group=self.groups.pipeline_group, device=self.groups.device, use_batch=True
        )

    def _hear(self) -> dict[str, _Form]:
        box: list = [None]
        dist.recv_object_list(
            box, self.before, group=self.groups.pipeline_group, device=self.groups.device, use_batch=True
        )
        return box[0]

    def _space(self, forms: Mapping[str, _Form] | None, names: tuple[str, ...]) -> Tensors:
        return {name: (forms or {})[name].empty(self.groups.device) for name in names}

    @staticmethod
    def _differentiable(forms: Mapping[str, _Form] | None) -> tuple[str, ...]:
        return tuple(name for name, form in (forms or {}).items() if form.requires_grad)


def one_forward_one_backward(
    neighbours: Neighbours,
    micro_batches: int,
    forward: Callable[[Tensors], Tensors],
    backward: Callable[[Tensors, Tensors, Tensors], Tensors],
) -> None:
    """Runs all micro-batches of one optimiser step through this stage.

    Args:
        forward: what was taken -> what is handed on, for the next micro-batch in order.
        backward: (taken, handed on, gradients of what was handed on) of the oldest micro-batch whose backward pass
            is still to come -> gradients of what was taken.
    """
    groups = neighbours.groups
    in_flight: deque[tuple[Tensors, Tensors]] = deque()
    ahead = min(groups.pipeline_parallel_size - 1 - groups.pipeline_parallel_rank, micro_batches)

    def run_forward(taken: Tensors) -> Tensors:
        handed_on = forward(taken)
        in_flight.append((taken, handed_on))
        return handed_on

    for _ in range(ahead):
        taken, _ = neighbours.exchange(take=True)
        neighbours.exchange(hand_on=run_forward(taken))
    if ahead < micro_batches:
        taken, _ = neighbours.exchange(take=True)
    for index in range(ahead, micro_batches):
        _, gradients = neighbours.exchange(hand_on=run_forward(taken), get_back=True)
        give_back = backward(*in_flight.popleft(), gradients)
        taken, _ = neighbours.exchange(give_back=give_back, take=index + 1 < micro_batches)
        del gradients, give_back  # not to be held through the next forward pass
    while in_flight:
        _, gradients = neighbours.exchange(get_back=True)
        neighbours.exchange(give_back=backward(*in_flight.popleft(), gradients))
    neighbours.finish()


@torch.no_grad()
def forward_only(neighbours: Neighbours, micro_batches: int, forward: Callable[[Tensors], Tensors]) -> None:
    """Runs micro-batches through this stage without gradients, for a measurement."""
    for _ in range(micro_batches):
        taken, _ = neighbours.exchange(take=True)
        neighbours.exchange(hand_on=forward(taken))
    neighbours.finish()


class SeedGradients(torch.autograd.Function):
    """A scalar whose backward pass starts with the loss and with given gradients of other tensors at once.

    `SeedGradients.apply(loss, gradients, *outputs)` is `loss`; DeepSpeed can run backward from it.
    """

    @staticmethod
    def forward(ctx, loss: torch.Tensor, gradients: list[torch.Tensor], *outputs: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        return gradient, None, *ctx.gradients
