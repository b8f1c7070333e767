"""A model that is a chain of steps, of which one process computes one stage."""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cola_megatron.config import RunConfig
from cola_megatron.models.chain_check import check_chain
from cola_megatron.models.steps import Stage, Step, cut_chain, run_steps
from cola_megatron.parallel import ProcessGroups

LOSS = "loss_"


class PipelinedModel(nn.Module):
    """Base of the model families.

    A family builds its networks `under_construction` and then calls `keep_own_stage`; its `steps(**mode)` are one
    training pass, in which names that begin with `loss_` are the terms of the loss and `weights(**mode)` says how they
    add up: it names every term of that pass, and no other. The steps with parameters must be the same, in the same
    order, in every mode (`Step.idle` keeps the place of one without work). With several stages a process holds the
    parameters of its own stage only, under the names that they have in the whole model.
    """

    config: RunConfig

    def __init__(self, groups: ProcessGroups, split: Sequence[int] | None):
        super().__init__()
        self.groups, self.split = groups, split
        self._chains: dict[tuple[tuple[str, bool], ...], tuple[Stage, list[str]]] = {}

    @property
    def batch_names(self) -> set[str]:
        """What every stage finds in its micro-batch."""
        raise NotImplementedError

    def steps(self, *arguments: Any, **mode: Any) -> list[Step]:
        """One training pass in order."""
        raise NotImplementedError

    def weights(self, *arguments: Any, **mode: Any) -> dict[str, float]:
        """Weight of each term of `steps(**mode)` in the loss."""
        raise NotImplementedError

    def trained_networks(self) -> dict[str, nn.Module]:
        """The networks that the run trains, by the first part of their parameters' names; alike on every stage."""
        return dict(self.named_children())

    def idle_networks(self, *arguments: Any, **mode: Any) -> dict[str, nn.Module]:
        """Of `trained_networks`, those that have no part in a step of this mode."""
        return {}

    def learning_rate_ratios(self) -> dict[str, float]:
        """Of networks whose learning rate is another than the schedule's: its multiple."""
        return {}

    def forward(
        self, batch: Mapping[str, torch.Tensor], taken: Mapping[str, torch.Tensor] | None = None, **mode: bool
    ) -> dict[str, torch.Tensor]:
        """Loss and its terms for one micro-batch, as far as this stage computes them.

        Args:
            taken: what the stage before handed on, by name.
            mode: passed to `steps`.

        Returns:
            float32 scalars: `loss`, and each term by name; and what this stage hands on, by name.
        """
        stage = self.stage(**mode)
        state = run_steps(stage.steps, {**batch, **(taken or {})}, keep=stage.hands_on)
        terms = {name.removeprefix(LOSS): state[name] for name in state if name.startswith(LOSS)}
        weights = self.weights(**mode)
        loss = sum((weights[name] * term for name, term in terms.items()), torch.zeros((), device=self.groups.device))
        handed_on = {name: state[name] for name in stage.hands_on}
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}, **handed_on}

    def stage(self, **mode: bool) -> Stage:
        """What this process computes of `steps(**mode)`."""
        return self._built(mode)[0]

    def own_stage_of(self, steps: Sequence[Step], batch_names: set[str], results: Collection[str]) -> Stage:
        """This process's stage of any chain whose steps with parameters are those of `steps()`.

        Args:
            results: names for which the chain is run.

        Raises:
            ValueError: the chain does not hold together; see `check_chain`.
        """
        check_chain(steps, batch_names, results)
        if self.split is None:
            return Stage(tuple(steps), (), ())
        return cut_chain(steps, self.split, batch_names)[self.groups.pipeline_parallel_rank]

    def term_names(self, **mode: bool) -> list[str]:
        """The terms of the loss over all stages, in order."""
        return self._built(mode)[1]

    def _built(self, mode: dict[str, bool]) -> tuple[Stage, list[str]]:
        """Stage and terms of a mode; the chain is built once, for it makes masks and tables of positions."""
        key = tuple(sorted(mode.items()))
        if key not in self._chains:
            steps = self.steps(**mode)
            names = [name for step in steps for name in step.writes if name.startswith(LOSS)]
            weighted = [LOSS + name for name in self.weights(**mode)]
            if unweighted := [name for name in names if name not in weighted]:
                raise ValueError(f"{type(self).__name__}.weights has no weight for {', '.join(unweighted)}")
            stage = self.own_stage_of(steps, self.batch_names, weighted)
            self._chains[key] = (stage, [name.removeprefix(LOSS) for name in names])
        return self._chains[key]

    def under_construction(self) -> contextlib.AbstractContextManager[Any]:
        """Where the networks are built: without memory if most of them belong to other stages."""
        return contextlib.nullcontext() if self.split is None else torch.device("meta")

    def keep_own_stage(self) -> None:
        """Drops the parameters of other stages and gives memory to the rest."""
        if self.split is None:
            return
        own = {
            id(parameter) for step in self.stage().steps for module in step.modules for parameter in module.parameters()
        }
        for module in self.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = _with_memory(parameter) if id(parameter) in own else None


def _with_memory(parameter: nn.Parameter) -> nn.Parameter:
    """The same parameter, notes included, in memory that is not yet filled."""
    filled = nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=parameter.requires_grad)
    filled.__dict__.update(parameter.__dict__)
    return filled
