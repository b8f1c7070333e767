"""What of a model and its optimiser this process holds, as pieces of whole tensors.

Three tensors belong to a trained parameter: `weights/NAME` (the float32 master), `exp_avg/NAME` and
`exp_avg_sq/NAME`; a frozen one has its weights only. Tensor parallelism holds a cut of the whole along one dimension,
and ZeRO a range of the flattened cut, which `rectangles` turns into pieces.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from cola_megatron.parallel import ProcessGroups
from cola_megatron.parallel.parameters import full_shape
from cola_megatron.training.sharded_tensors import Piece, rectangles

if TYPE_CHECKING:
    from cola_megatron.training.engine import Engine

WEIGHTS, MOMENTS = "weights/", ("exp_avg", "exp_avg_sq")


def weight_pieces(module: nn.Module, groups: ProcessGroups, prefix: str = "") -> Iterator[Piece]:
    """This process's cut of all weights of a module that no engine has taken over yet, to be loaded.

    Args:
        prefix: what the names in the checkpoint have before those in the module.
    """
    for name, parameter in module.named_parameters():
        if parameter.full_size is not None:
            parameter.detach().zero_()  # the checkpoint has no padding rows
        yield from _pieces(f"{WEIGHTS}{prefix}{name}", parameter, groups, 0, parameter.detach().view(-1))


def frozen_weights(model: nn.Module, groups: ProcessGroups) -> dict[str, torch.Tensor]:
    """Float32 copies in host memory of those frozen parameters that this process will write into checkpoints.

    To be taken before an engine brings the model to its compute precision: frozen parameters have no masters.
    """
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True).view(-1)
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and groups.data_parallel_rank == 0 and _is_writer(parameter, groups)
    }


def frozen_pieces(engine: "Engine") -> Iterator[Piece]:
    """What this process writes of the frozen parameters: values in host memory that never change."""
    parameters = dict(engine.model.named_parameters())
    for name, frozen in engine.frozen.items():
        yield from _pieces(f"{WEIGHTS}{name}", parameters[name], engine.groups, 0, frozen)


def trained_pieces(engine: "Engine", steps: int) -> Iterator[Piece]:
    """What this process writes of the trained ones after `steps` optimiser steps: values that the next step changes.

    With `frozen_pieces`, all processes together write every element once.
    """
    _prepare_moments(engine)
    counted = {int(_adam(engine).state[flat]["step"]) for flat in _flat_tensors(engine)}
    if counted - {steps}:  # what is not saved must follow from what is
        raise RuntimeError(f"AdamW has counted {sorted(counted)} steps, the run {steps}")
    for held in _held(engine, shared_out=True):
        if _is_writer(held.parameter, engine.groups):
            yield from _pieces_of(held, engine)


def pieces_to_load(engine: "Engine", steps: int) -> Iterator[Piece]:
    """What this process holds of masters and moments, to be overwritten; `steps` is what Adam has counted."""
    _prepare_moments(engine)
    for flat in _flat_tensors(engine):
        _adam(engine).state[flat]["step"].fill_(steps)
    for held in _held(engine, shared_out=False):
        yield from _pieces_of(held, engine)


class _Held(NamedTuple):
    """A range of a flattened parameter, as a range of the optimiser's own tensor."""

    name: str
    parameter: nn.Parameter
    start: int
    flat: torch.Tensor
    flat_start: int
    count: int


def _held(engine: "Engine", shared_out: bool) -> Iterator[_Held]:
    """What this process's optimiser updates; `shared_out`: without what another data-parallel rank holds as well."""
    groups, zero = engine.groups, engine.deepspeed.optimizer
    for name, parameter in engine.model.named_parameters():
        if not parameter.requires_grad:
            continue
        if engine.config.parallel.zero_stage == 0:
            rank, ranks = (groups.data_parallel_rank, groups.data_parallel_size) if shared_out else (0, 1)
            start, stop = (parameter.numel() * end // ranks for end in (rank, rank + 1))
            yield _Held(name, parameter, start, parameter, start, stop - start)
        elif engine.config.parallel.zero_stage == 3:
            group, flat_start, part = zero.grad_position[zero.get_param_id(parameter)]
            start = groups.data_parallel_rank * part
            count = max(0, min(part, parameter.ds_numel - start))  # the parts are padded to one size
            yield _Held(name, parameter, start, zero.fp32_partitioned_groups_flat[group], flat_start, count)
        elif parameter._hp_mapping is not None:
            here, there = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
            (flat,) = zero.param_groups[parameter._hp_mapping.param_group_index]["params"]
            yield _Held(name, parameter, here.start, flat, there.start, here.numel)


def _adam(engine: "Engine") -> torch.optim.AdamW:
    zero = engine.deepspeed.optimizer
    return zero if engine.config.parallel.zero_stage == 0 else zero.optimizer


def _flat_tensors(engine: "Engine") -> list[torch.Tensor]:
    """The tensors that AdamW knows as its parameters."""
    if engine.config.parallel.zero_stage == 3:  # which shows them to AdamW one by one, during a step
        return engine.deepspeed.optimizer.fp32_partitioned_groups_flat
    return [flat for group in _adam(engine).param_groups for flat in group["params"]]


def _prepare_moments(engine: "Engine") -> None:
    """Gives AdamW the state that it would give itself in its first step, where it has none yet."""
    adam = _adam(engine)
    for flat in _flat_tensors(engine):
        if not adam.state[flat]:
            where = flat.device if adam.defaults["fused"] else "cpu"
            adam.state[flat]["step"] = torch.zeros((), dtype=torch.float32, device=where)
            for moment in MOMENTS:
                adam.state[flat][moment] = torch.zeros_like(flat, memory_format=torch.preserve_format)


def _pieces_of(held: _Held, engine: "Engine") -> Iterator[Piece]:
    state = _adam(engine).state[held.flat]
    for kind, flat in {WEIGHTS: held.flat, **{f"{moment}/": state[moment] for moment in MOMENTS}}.items():
        values = flat.detach().view(-1).narrow(0, held.flat_start, held.count)
        yield from _pieces(f"{kind}{held.name}", held.parameter, engine.groups, held.start, values)


def _is_writer(parameter: nn.Parameter, groups: ProcessGroups) -> bool:
    """Of what all tensor-parallel ranks hold, the first writes."""
    return parameter.tensor_model_parallel or groups.tensor_parallel_rank == 0


def _pieces(
    name: str, parameter: nn.Parameter, groups: ProcessGroups, start: int, values: torch.Tensor
) -> Iterator[Piece]:
    """`values`, the elements from `start` on of this rank's flattened cut, as pieces of the whole; without padding."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO 3 keeps the true shape beside an empty tensor
    whole, position = tuple(full_shape(parameter, groups)), 0
    for offsets, sizes in rectangles(shape, start, start + values.numel()):
        piece = values.narrow(0, position, math.prod(sizes)).view(sizes)
        position += piece.numel()
        if parameter.tensor_model_parallel:
            dim = parameter.partition_dim
            begin = offsets[dim] + groups.tensor_parallel_rank * shape[dim]
            if begin >= whole[dim]:
                continue
            piece = piece.narrow(dim, 0, min(sizes[dim], whole[dim] - begin))
            offsets = (*offsets[:dim], begin, *offsets[dim + 1 :])
        yield Piece(name, whole, offsets, piece)
