"""How a loss is averaged over a batch. Shapes: S positions (tokens or latents), P of a part of them, B batch."""

import torch


def mean_over_counted(
    values_SB: torch.Tensor, counted_SB: torch.Tensor, whole_SB: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean over samples of the mean over their counted positions.

    Averaged per sample first, so that the mean over a batch is the mean over its micro-batches, however many positions
    each of them counts. A sample that counts none gives 0.

    Args:
        whole_SB: the counted positions of whole samples, where the others are of a part of them: the summand of that
            part.
    """
    return sample_means(values_SB, counted_SB, whole_SB).mean()


def sample_means(
    values_SB: torch.Tensor, counted_SB: torch.Tensor, whole_SB: torch.Tensor | None = None
) -> torch.Tensor:
    """Of each sample the mean over its counted positions, (B,); 0 where it counts none. `whole_SB` as above."""
    weight_SB = counted_SB.to(values_SB.dtype)
    number_B = weight_SB.sum(0) if whole_SB is None else whole_SB.to(values_SB.dtype).sum(0)
    return (values_SB * weight_SB).sum(0) / number_B.clamp(min=1)


def weights_of_mean(counted_SB: torch.Tensor) -> torch.Tensor:
    """The weights, float32, with which `mean_over_counted` sums values up."""
    weight_SB = counted_SB.float()
    return weight_SB / weight_SB.sum(0).clamp(min=1) / weight_SB.shape[1]
