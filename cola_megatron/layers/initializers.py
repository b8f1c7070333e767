"""How parameters start. Each returns `fill(whole_tensor, generator)`, drawing only from the given generator."""

import math

import torch

from cola_megatron.parallel.parameters import Initializer


def truncated_normal(std: float, cutoff_factor: float = 3.0) -> Initializer:
    """N(0, std^2), cut at `cutoff_factor` standard deviations."""
    bound = std * cutoff_factor
    return lambda whole, generator: torch.nn.init.trunc_normal_(whole, 0.0, std, -bound, bound, generator=generator)


def normal(std: float) -> Initializer:
    """N(0, std^2)."""
    return lambda whole, generator: whole.normal_(0.0, std, generator=generator)


def xavier_uniform(inputs_over: float = 1.0, outputs_over: float = 1.0) -> Initializer:
    """Uniform in +-sqrt(6 / (fan_in + fan_out)) of the whole matrix (out, in), a fused projection counted whole.

    Args:
        inputs_over, outputs_over: how many times the inputs and outputs of the matrix are those that the bound is of: a
            role multiplies what a network of the base width starts with.
    """

    def fill(whole: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        bound = math.sqrt(6.0 / (whole.shape[0] / outputs_over + whole.shape[1] / inputs_over))
        return whole.uniform_(-bound, bound, generator=generator)

    return fill


def zeros(whole: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """All zero."""
    return whole.zero_()


def ones(whole: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """All one."""
    return whole.fill_(1.0)
