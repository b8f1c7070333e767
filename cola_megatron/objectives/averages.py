"""How a loss is averaged over a batch. Shapes: S positions (tokens or latents), B batch."""

import torch


def mean_over_counted(values_SB: torch.Tensor, counted_SB: torch.Tensor) -> torch.Tensor:
    """Mean over samples of the mean over their counted positions.

    Averaged per sample first, so that the mean over a batch is the mean over its micro-batches, however many positions
    each of them counts. A sample that counts none gives 0.
    """
    return sample_means(values_SB, counted_SB).mean()


def sample_means(values_SB: torch.Tensor, counted_SB: torch.Tensor) -> torch.Tensor:
    """Of each sample the mean over its counted positions, (B,); 0 where it counts none."""
    weight_SB = counted_SB.to(values_SB.dtype)
    return (values_SB * weight_SB).sum(0) / weight_SB.sum(0).clamp(min=1)


def weights_of_mean(counted_SB: torch.Tensor) -> torch.Tensor:
    """The weights, float32, with which `mean_over_counted` sums values up."""
    weight_SB = counted_SB.float()
    return weight_SB / weight_SB.sum(0).clamp(min=1) / weight_SB.shape[1]
