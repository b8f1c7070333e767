"""Parameters under tensor parallelism: how they start, how whole tensors enter and leave the shards.

A parameter says of itself how it is cut (`partition_dim`, or None when every rank holds it whole), how it starts
(`initializer`) and what it is to its network (`role`), from which follows how fast it learns. From that alone every
layout builds the same model.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from cola_megatron.parallel.groups import ProcessGroups

Initializer = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class Role:
    """What a parameter is to its network, and how start and learning differ from the standard ones for it.

    `layers/roles.py` has the roles that there are.
    """

    name: str
    start: float = 1.0
    """Multiple of the standard starting values."""
    rate: float = 1.0
    """Multiple of the learning rate; weight decay is divided by it, so that their product stays."""
    eps: float = 1.0
    """Multiple of AdamW's epsilon."""
    muon_rate: float | None = None
    """Multiple of the learning rate where Muon updates the parameter; None: it is no matrix for Muon."""
    bias: "Role | None" = None
    """Of a matrix: the role of the bias that belongs to it."""


@dataclass(frozen=True)
class ParameterMarks:
    """What `mark_parameter` notes on a parameter."""

    initializer: Initializer
    role: Role
    partition_dim: int | None
    full_size: int | None
    partial_gradient: bool
    fused_rows: tuple[int, ...] | None


def mark_parameter(
    parameter: nn.Parameter,
    initializer: Initializer,
    role: Role | None,
    partition_dim: int | None = None,
    full_size: int | None = None,
    partial_gradient: bool = False,
    fused_rows: tuple[int, ...] | None = None,
) -> None:
    """Notes on a parameter how it starts, what it is, and how tensor parallelism cuts it.

    Args:
        initializer: fills a whole float32 tensor in place with a generator; the role's `start` multiplies it.
        role: every parameter has one; None, of the bias of what has no bias, is refused.
        partition_dim: the dimension cut over the tensor-parallel ranks, None for a replicated parameter.
        full_size: size of `partition_dim` in the whole tensor where padding makes the shards' sum larger (vocabulary).
        partial_gradient: a replicated parameter whose gradient on one rank is a partial sum over the tensor-parallel
            ranks (each saw its own part of the sequence, or its own heads).
        fused_rows: of a matrix that is several projections of one input: the rows of each of them in one group of rows.

    Raises:
        TypeError: no role.
    """
    if role is None:
        raise TypeError(f"a parameter of shape {tuple(parameter.shape)} has no role: see layers/roles.py")
    vars(parameter).update(
        marks=ParameterMarks(initializer, role, partition_dim, full_size, partial_gradient, fused_rows),
        # What megatron-core sets and DeepSpeed reads, when it counts a parameter of several ranks once.
        tensor_model_parallel=partition_dim is not None,
        partition_dim=-1 if partition_dim is None else partition_dim,
    )


def marks_of(parameter: nn.Parameter) -> ParameterMarks:
    """What was noted on a parameter; every parameter of a model has been marked."""
    marks = vars(parameter).get("marks")
    if not isinstance(marks, ParameterMarks):
        raise TypeError(f"a parameter of shape {tuple(parameter.shape)} was not marked: its layer calls mark_parameter")
    return marks


def full_shape(parameter: nn.Parameter, groups: ProcessGroups) -> torch.Size:
    """Shape of the whole tensor of which `parameter` is this rank's part."""
    shape = list(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO 3 keeps the true shape beside an empty tensor
    marks = marks_of(parameter)
    if marks.partition_dim is not None:
        shape[marks.partition_dim] = marks.full_size or shape[marks.partition_dim] * groups.tensor_parallel_size
    return torch.Size(shape)


def shard_of(whole: torch.Tensor, parameter: nn.Parameter, groups: ProcessGroups) -> torch.Tensor:
    """This rank's part of a whole tensor; rows beyond `full_size` are zero."""
    dim = marks_of(parameter).partition_dim
    if dim is None:
        return whole
    part = parameter.shape[dim]
    start = groups.tensor_parallel_rank * part
    length = max(0, min(part, whole.shape[dim] - start))
    piece = whole.narrow(dim, min(start, whole.shape[dim]), length)
    if length == part:
        return piece
    padded = whole.new_zeros(parameter.shape)
    padded.narrow(dim, 0, length).copy_(piece)
    return padded


def sum_partial_gradients(module: nn.Module, groups: ProcessGroups) -> None:
    """Makes every backward pass sum partial gradients over the tensor-parallel ranks before ZeRO sees them."""
    if groups.tensor_parallel_size == 1:
        return

    def summed(gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)  # autograd may share the original
        dist.all_reduce(total, group=groups.tensor_group)
        return total

    for parameter in module.parameters():
        if marks_of(parameter).partial_gradient and parameter.requires_grad:
            parameter.register_hook(summed)


@torch.no_grad()
def initialize_parameters(module: nn.Module, seed: int, groups: ProcessGroups) -> None:
    """Starts every parameter from (seed, its name) alone: no layout and no order of construction changes it."""
    for name, parameter in module.named_parameters():
        digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        marks = marks_of(parameter)
        whole = marks.initializer(torch.empty(full_shape(parameter, groups)), generator)
        if marks.role.start != 1:
            whole = whole.mul_(marks.role.start)
        parameter.copy_(shard_of(whole, parameter, groups))


@torch.no_grad()
def load_full_state_dict(module: nn.Module, state: dict[str, torch.Tensor], groups: ProcessGroups) -> None:
    """Copies whole tensors into the (sharded) parameters of `module`.

    Raises:
        ValueError: names that are missing or unknown, or a shape that differs; the message lists them.
    """
    parameters = dict(module.named_parameters())
    missing, unknown = sorted(parameters.keys() - state.keys()), sorted(state.keys() - parameters.keys())
    if missing or unknown:
        raise ValueError(f"the weights do not fit the model: missing {missing or 'none'}, unknown {unknown or 'none'}")
    for name, parameter in parameters.items():
        expected = full_shape(parameter, groups)
        if state[name].shape != expected:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)}, the model needs {tuple(expected)}")
        parameter.copy_(shard_of(state[name], parameter, groups))


@torch.no_grad()
def gather_state_dict(
    module: nn.Module,
    groups: ProcessGroups,
    values: Callable[[nn.Parameter], torch.Tensor] = lambda parameter: parameter,
    keep: bool = True,
) -> dict[str, torch.Tensor]:
    """Whole float32 tensors of all parameters, on the CPU.

    Args:
        values: maps a parameter to what is gathered in its place (its gradient, its float32 master copy, ...).
        keep: False takes part in the collectives and returns nothing: not every rank has room for a whole model.
    """
    whole = {}
    for name, parameter in module.named_parameters():
        piece = values(parameter).detach().float()
        marks = marks_of(parameter)
        if marks.partition_dim is not None and groups.tensor_parallel_size > 1:
            pieces = [torch.empty_like(piece) for _ in range(groups.tensor_parallel_size)]
            dist.all_gather(pieces, piece.contiguous(), group=groups.tensor_group)
            piece = torch.cat(pieces, dim=marks.partition_dim)
            if marks.full_size is not None:
                piece = piece.narrow(marks.partition_dim, 0, marks.full_size)
        if keep:
            whole[name] = piece.cpu()
    return whole
