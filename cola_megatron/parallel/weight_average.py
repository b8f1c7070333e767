"""Exponential moving average of the trained weights, in float32, of what each rank's optimiser holds.

    average <- d average + (1 - d) weights,    d = min(decay, (1 + n) / (10 + n))

after the n-th update since the average began, which is n = 1 for the first. The second bound lets a young average
follow: under the decay alone a tenth of the weights at which it began would be in it for 2.3 / (1 - decay) updates.
"""

from collections.abc import Sequence

import torch


class WeightAverage:
    """Keeps a tensor beside each of the optimiser's own, on the same device.

    Args:
        weights: the float32 tensors that the optimiser updates (`ZeroOptimizer.flat_masters`).
        decay: at most so much of the average stays in an update.
    """

    def __init__(self, weights: Sequence[torch.Tensor], decay: float):
        self.decay, self._weights = decay, [each.detach() for each in weights]
        self._averages = [each.clone() for each in self._weights]
        self._index = {id(each): index for index, each in enumerate(weights)}
        self.updates = 0
        """That it has seen since it began."""

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """The average of one of the optimiser's tensors."""
        return self._averages[self._index[id(weight)]]

    @torch.no_grad()
    def begin(self) -> None:
        """Begins anew at the present weights."""
        self.updates = 0
        for average, weight in zip(self._averages, self._weights, strict=True):
            average.copy_(weight)

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights after an update."""
        self.updates += 1
        rate = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._averages, self._weights, rate)
