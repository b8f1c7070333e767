"""What of a model and its optimiser this process holds, as pieces of whole tensors.

Three tensors belong to a trained parameter: `weights/NAME` (the float32 master), `exp_avg/NAME` and
`exp_avg_sq/NAME`, or two where Muon updates it: `momentum/NAME` in place of these. A frozen one has its weights only.
A run that keeps an average of its weights has `ema/NAME` of every trained one.
Tensor parallelism holds a cut of the whole along one dimension, and ZeRO a range of the flattened cut, which
`rectangles` turns into pieces.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import nn

from cola_megatron.checkpoint.sharded_tensors import Piece, rectangles
from cola_megatron.config import RunConfig
from cola_megatron.parallel import ProcessGroups
from cola_megatron.parallel.parameters import full_shape, marks_of
from cola_megatron.parallel.weight_average import WeightAverage
from cola_megatron.parallel.zero_optimizer import Fragment, ZeroOptimizer

WEIGHTS, EMA = "weights/", "ema/"
EMA_UPDATES = "ema_updates"
"""Key of state.json: how many updates the average has seen; there is one where the key is."""


class TrainingState(Protocol):
    """What a checkpoint holds of a run: its engine, as it is seen from here."""

    config: RunConfig
    groups: ProcessGroups
    optimizer: ZeroOptimizer
    frozen: dict[str, torch.Tensor]
    """`frozen_weights` of the model as it started."""
    skipped_updates: int
    """Steps so far whose update was not applied: AdamW has counted so many fewer."""
    ema: WeightAverage | None

    @property
    def model(self) -> nn.Module:
        """The model, with its parameters in compute precision."""


def weight_pieces(module: nn.Module, groups: ProcessGroups, prefix: str = "") -> Iterator[Piece]:
    """This process's cut of all weights of a module that no engine has taken over yet, to be loaded.

    Args:
        prefix: what the names in the checkpoint have before those in the module.
    """
    for name, parameter in module.named_parameters():
        if marks_of(parameter).full_size is not None:
            parameter.detach().zero_()  # the checkpoint has no padding rows
        yield from _pieces(f"{WEIGHTS}{prefix}{name}", parameter, groups, 0, parameter.detach().view(-1))


def frozen_weights(model: nn.Module, groups: ProcessGroups) -> dict[str, torch.Tensor]:
    """Float32 copies in host memory of those frozen parameters that this process will write into checkpoints.

    To be taken before an engine brings the model to its compute precision: frozen parameters have no masters.
    """
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True).view(-1)
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and groups.same_weights_rank == 0 and _is_writer(parameter, groups)
    }


def frozen_pieces(state: TrainingState) -> Iterator[Piece]:
    """What this process writes of the frozen parameters: values in host memory that never change."""
    parameters = dict(state.model.named_parameters())
    for name, frozen in state.frozen.items():
        yield from _pieces(f"{WEIGHTS}{name}", parameters[name], state.groups, 0, frozen)


def trained_pieces(state: TrainingState, steps: int) -> Iterator[Piece]:
    """What this process writes of the trained ones after `steps` optimiser steps: values that the next step changes.

    With `frozen_pieces`, all processes together write every element once.
    """
    _prepare_moments(state.optimizer)
    adam = state.optimizer.adam
    counted = {int(adam.state[flat]["step"]) for flat in state.optimizer.flat_masters}
    if counted - {steps}:  # what is not saved must follow from what is
        raise RuntimeError(f"AdamW has counted {sorted(counted)} steps, the run {steps}")
    for held in _held(state, shared_out=True):
        if _is_writer(held.parameter, state.groups):
            yield from _pieces_of(held, state, state.ema)


def pieces_to_load(state: TrainingState, steps: int, ema: WeightAverage | None) -> Iterator[Piece]:
    """What this process holds of masters, moments and average, to be overwritten; `steps` is what Adam has counted."""
    _prepare_moments(state.optimizer)
    for flat in state.optimizer.flat_masters:
        state.optimizer.adam.state[flat]["step"].fill_(steps)
    for held in _held(state, shared_out=False):
        yield from _pieces_of(held, state, ema)


def state_of_average(state: TrainingState) -> dict[str, int]:
    """What state.json says of the average of the weights; nothing where there is none."""
    return {} if state.ema is None else {EMA_UPDATES: state.ema.updates}


class _Held(NamedTuple):
    name: str
    parameter: nn.Parameter
    fragment: Fragment


def _held(state: TrainingState, shared_out: bool) -> Iterator[_Held]:
    """What this process's optimiser updates; `shared_out`: without what another rank holds as well."""
    for name, parameter in state.model.named_parameters():
        fragment = state.optimizer.fragment(parameter, shared_out) if parameter.requires_grad else None
        if fragment is not None:
            yield _Held(name, parameter, fragment)


def _prepare_moments(optimizer: ZeroOptimizer) -> None:
    """Gives AdamW the state that it would give itself in its first step, where it has none yet."""
    adam = optimizer.adam
    for flat in optimizer.flat_masters:
        if not adam.state[flat]:
            where = flat.device if adam.defaults["fused"] else "cpu"
            adam.state[flat]["step"] = torch.zeros((), dtype=torch.float32, device=where)
            for moment in optimizer.moments(flat):
                adam.state[flat][moment] = torch.zeros_like(flat, memory_format=torch.preserve_format)


def _pieces_of(held: _Held, state: TrainingState, ema: WeightAverage | None) -> Iterator[Piece]:
    start, master, flat_start, count = held.fragment
    adam = state.optimizer.adam.state[master]
    moments = {f"{moment}/": adam[moment] for moment in state.optimizer.moments(master)}
    averages = {} if ema is None else {EMA: ema.of(master)}
    for kind, flat in {WEIGHTS: master, **moments, **averages}.items():
        values = flat.detach().view(-1).narrow(0, flat_start, count)
        yield from _pieces(f"{kind}{held.name}", held.parameter, state.groups, start, values)


def _is_writer(parameter: nn.Parameter, groups: ProcessGroups) -> bool:
    """Of what all tensor-parallel ranks hold, the first writes."""
    return marks_of(parameter).partition_dim is not None or groups.tensor_parallel_rank == 0


def _pieces(
    name: str, parameter: nn.Parameter, groups: ProcessGroups, start: int, values: torch.Tensor
) -> Iterator[Piece]:
    """`values`, the elements from `start` on of this rank's flattened cut, as pieces of the whole; without padding."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO 3 keeps the true shape beside an empty tensor
    whole, position = tuple(full_shape(parameter, groups)), 0
    dim = marks_of(parameter).partition_dim
    for offsets, sizes in rectangles(shape, start, start + values.numel()):
        piece = values.narrow(0, position, math.prod(sizes)).view(sizes)
        position += piece.numel()
        if dim is not None:
            begin = offsets[dim] + groups.tensor_parallel_rank * shape[dim]
            if begin >= whole[dim]:
                continue
            piece = piece.narrow(dim, 0, min(sizes[dim], whole[dim] - begin))
            offsets = (*offsets[:dim], begin, *offsets[dim + 1 :])
        yield Piece(name, whole, offsets, piece)
