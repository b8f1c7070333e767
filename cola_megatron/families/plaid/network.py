"""What Plaid has beside the transformer: embeddings, noise schedule, and the way in for noisy embeddings.

As published: rows of length 1 for embeddings; z_t at unit variance, the first estimate and a sinusoid of gamma, each
through a linear map without bias, the latter two starting at 0. Ours: the first map starts so that hidden states begin
as large as the other families' token embeddings do, beside which the blocks' first outputs are not small.

Shapes: S positions, B batch, C channels of an embedding, H hidden, V vocabulary on this rank.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from cola_megatron.config.plaid import PlaidDiffusionConfig
from cola_megatron.config.transformer import TransformerConfig
from cola_megatron.families.plaid.schedule import NoiseSchedule
from cola_megatron.layers import initializers
from cola_megatron.layers.embedding import padded_vocab_size
from cola_megatron.layers.linear import ColumnLinear
from cola_megatron.layers.roles import FIXED, Roles
from cola_megatron.objectives.plaid import unit_variance
from cola_megatron.parallel import ProcessGroups, mark_parameter
from cola_megatron.parallel.megatron import scatter_to_sequence_parallel_region
from cola_megatron.parallel.parameters import Initializer
from cola_megatron.parallel.sequence_parts import own_part

LOWEST_FREQUENCY, HIGHEST_FREQUENCY = -5.0, 5.0
"""Logarithms of the frequencies of the sinusoid of gamma, as published."""


class OnNothing(Protocol):
    """A layer that has no input."""

    def __call__(self) -> torch.Tensor: ...


class UnitEmbeddings(nn.Module):
    """Rows of length 1, cut over the vocabulary."""

    __call__: OnNothing

    def __init__(self, vocab_size: int, channels: int, *, groups: ProcessGroups):
        super().__init__()
        rows = padded_vocab_size(vocab_size, groups) // groups.tensor_parallel_size
        self.weight = nn.Parameter(torch.empty(rows, channels))
        mark_parameter(self.weight, _rows_of_length_one, FIXED, partition_dim=0, full_size=vocab_size)

    def forward(self) -> torch.Tensor:
        """(V, C), float32. The rows that fill up a rank's part are 0."""
        weight_VC = self.weight.float()
        return weight_VC / (weight_VC.square().sum(-1, keepdim=True) + 1e-12).sqrt()


def _rows_of_length_one(whole: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    initializers.normal(1.0)(whole, generator)
    return whole.div_(whole.norm(dim=-1, keepdim=True))


class NoisyInput(nn.Module):
    """z_t, its noise level and the first estimate of x -> hidden.

    Args:
        self_conditioning: there is a first estimate.
    """

    __call__: Callable[..., torch.Tensor]

    def __init__(
        self,
        config: PlaidDiffusionConfig,
        transformer: TransformerConfig,
        self_conditioning: bool,
        *,
        groups: ProcessGroups,
    ):
        super().__init__()
        self.config, self.groups = config, groups
        roles = Roles(transformer.parametrization, transformer.hidden_size, transformer.num_layers)

        def linear(input_size: int, initializer: Initializer) -> ColumnLinear:
            return ColumnLinear(
                input_size,
                transformer.hidden_size,
                groups=groups,
                bias=False,
                initializer=initializer,
                role=roles.embedding,
                gather_output=True,
                replicated_input=True,
            )

        self.state = linear(
            config.embedding_dim, initializers.normal(transformer.init_std * config.embedding_dim**-0.5)
        )
        self.level = linear(config.gamma_features, initializers.zeros)
        self.estimate = linear(config.embedding_dim, initializers.zeros) if self_conditioning else None

    def forward(
        self, z_SBC: torch.Tensor, gamma_B: torch.Tensor, estimate_SBC: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Whole sequences on every rank, (S, B, C) -> those of its positions, (S, B, H).

        Args:
            estimate_SBC: 0 for samples without a first estimate; None: there is none of any.
        """
        x_SBH = self.state(unit_variance(own_part(z_SBC, self.groups), gamma_B)) + self.level(
            self.features(gamma_B)[None]
        )
        if self.estimate is not None and estimate_SBC is not None:
            estimate_SBC = own_part(estimate_SBC, self.groups)
            x_SBH = x_SBH + self.estimate(estimate_SBC * self.config.embedding_dim**0.5)
        return scatter_to_sequence_parallel_region(x_SBH) if self.groups.sequence_parallel else x_SBH

    def features(self, gamma_B: torch.Tensor) -> torch.Tensor:
        """[sin(w gamma), cos(w gamma)], w from e^-5 to e^5; (B,) -> (B, features), float32."""
        exponents = torch.linspace(
            LOWEST_FREQUENCY,
            HIGHEST_FREQUENCY,
            self.config.gamma_features // 2,
            device=gamma_B.device,
            dtype=torch.float64,
        )
        angles = gamma_B.double()[:, None] * exponents.exp()
        return torch.cat((angles.sin(), angles.cos()), dim=-1).float()


class PlaidParts(nn.Module):
    """Everything of Plaid that is not the transformer."""

    def __init__(
        self,
        vocab_size: int,
        config: PlaidDiffusionConfig,
        transformer: TransformerConfig,
        self_conditioning: bool,
        groups: ProcessGroups,
    ):
        super().__init__()
        self.config = config
        self.embeddings = UnitEmbeddings(vocab_size, config.embedding_dim, groups=groups)
        self.schedule = NoiseSchedule(config.schedule_hidden_size, config.gamma_start, config.gamma_end)
        self.input = NoisyInput(config, transformer, self_conditioning, groups=groups)
