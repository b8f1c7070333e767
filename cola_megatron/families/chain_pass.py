"""One pass of a chain beside training's, such as held-out texts need: in any layout, with the answer on every rank."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist

from cola_megatron.models.compiled_blocks import uncompiled
from cola_megatron.models.pipelined import PipelinedModel
from cola_megatron.models.steps import Step, run_steps
from cola_megatron.parallel.pipeline import Neighbours, Tensors, forward_only


class ChainPass:
    """A chain over the steps with parameters of training, without gradients; its first result is the answer.

    Args:
        results: names for which the chain is run.
        batch: names that every stage is given.
    """

    def __init__(self, model: PipelinedModel, chain: Sequence[Step], results: Sequence[str], batch: Collection[str]):
        self.groups, self.result = model.groups, results[0]
        self.stage = model.own_stage_of(chain, set(batch), results)
        self.neighbours = Neighbours(model.groups, self.stage.takes, self.stage.hands_on)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any], like: torch.Tensor) -> torch.Tensor:
        """The answer, which has shape and type of `like`."""
        found = torch.zeros(like.shape, dtype=like.dtype, device=like.device)

        def forward(taken: Tensors) -> Tensors:
            nonlocal found
            state = run_steps(self.stage.steps, {**batch, **taken}, keep=self.stage.hands_on)
            found = state.get(self.result, found).contiguous()  # a sum over stages adds up memory as it lies
            return {name: state[name] for name in self.stage.hands_on}

        with uncompiled():
            forward_only(self.neighbours, 1, forward)
        if self.groups.pipeline_parallel_size > 1:
            dist.all_reduce(found, group=self.groups.pipeline_group)  # it is made in one stage
        return found
