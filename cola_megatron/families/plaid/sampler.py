"""Ancestral sampling of Plaid from t = 1 to 0, over whatever computes the network: one process, or every layout.

As published: the sampler of a variational diffusion model in float64; x_hat of the step before is the estimate that the
network is told; the predicted noise is divided by a temperature; at t = 0 the token is chosen from the network's
logits. A prompt is held by replacement (ours; the published code steers by gradients of log p(token | z_t) instead):
its positions begin as q(z_1 | prompt), and x_hat is there the true embedding wherever it is used. So by
`ancestral_step` they are a draw of q(z_t | prompt) at every t.

Shapes: S positions, B samples of one length, C channels of an embedding.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch

from cola_megatron.objectives.plaid import ancestral_step, noisy_embeddings, tempered_estimate


class Prompts(NamedTuple):
    """What is known of a batch."""

    embeddings_SBC: torch.Tensor
    """Of the prompts' tokens, float64; of the other positions anything."""
    held_SB1: torch.Tensor
    """True where the token is known."""


class Predictor(Protocol):
    """x_hat(z_t, t) of a batch."""

    def __call__(self, z_SBC: torch.Tensor, gamma_B: torch.Tensor, told_SBC: torch.Tensor | None) -> torch.Tensor:
        """(S, B, C), float64. `told_SBC`: the estimate before, None at first."""


class State(NamedTuple):
    """Before a step: what the network sees, and what it made of it."""

    step: int
    time: float
    z_SBC: torch.Tensor
    gamma_B: torch.Tensor
    told_SBC: torch.Tensor | None


def time_grid(steps: int, device: torch.device) -> torch.Tensor:
    """1, 1 - 1 / steps, ..., 0; float64."""
    return torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64, device=device)


def sample(
    predict: Predictor,
    prompts: Prompts,
    noise: Callable[[], torch.Tensor],
    gammas: torch.Tensor,
    score_temperature: float,
) -> Iterator[State]:
    """The states at every time of the grid in order, the last one at t = 0.

    Args:
        noise: the next standard normal noise of the batch, (S, B, C), float64.
        gammas: noise levels at `time_grid`.
    """
    z_SBC, told_SBC = noise(), None
    levels, times = gammas[:, None].expand(-1, z_SBC.shape[1]), time_grid(len(gammas) - 1, gammas.device).tolist()
    begun_SBC = noisy_embeddings(prompts.embeddings_SBC, z_SBC, levels[0])
    z_SBC = torch.where(prompts.held_SB1, begun_SBC, z_SBC)
    for step in range(len(gammas) - 1):
        yield State(step, times[step], z_SBC, levels[step], told_SBC)
        estimate_SBC = predict(z_SBC, levels[step], told_SBC)
        told_SBC = torch.where(prompts.held_SB1, prompts.embeddings_SBC, estimate_SBC)
        used_SBC = tempered_estimate(z_SBC, estimate_SBC, levels[step], score_temperature)
        used_SBC = torch.where(prompts.held_SB1, prompts.embeddings_SBC, used_SBC)
        z_SBC = ancestral_step(z_SBC, used_SBC, noise(), levels[step], levels[step + 1])
    yield State(len(gammas) - 1, 0.0, z_SBC, levels[-1], told_SBC)


def noise_of(generators: Sequence[torch.Generator], shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Standard normal noise (S, B, C), each sample's from its own stream."""
    noise = [torch.randn(shape, generator=generator, dtype=torch.float64) for generator in generators]
    return torch.stack(noise, dim=1).to(device)
