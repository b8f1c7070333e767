"""How a network's starting weights and learning rates follow from its size."""

from typing import Annotated, Any, Literal

from pydantic import model_validator

from cola_megatron.config.base import Section
from cola_megatron.config.facts import OURS
from cola_megatron.config.types import PositiveInt


class ParametrizationConfig(Section):
    """Starting weights and learning rates of a network as a function of its width and depth (docs/parametrization.md).

    At the base sizes every kind is `standard`: what is tuned there holds for the other sizes. The forward pass is the
    same in all of them.
    """

    kind: Annotated[Literal["standard", "mup", "completep"], OURS] = "standard"
    """standard: one start and one rate for all sizes. mup: they follow from the width (arXiv 2203.03466). completep:
    from width and depth (arXiv 2505.01618)."""
    base_width: Annotated[PositiveInt | None, OURS] = None
    """The `hidden_size` at which start and rates are those of `standard`; needed by mup and completep. Heads and
    feed-forward grow with the width, and the channels of a head stay."""
    base_depth: Annotated[PositiveInt | None, OURS] = None
    """The number of blocks at which they are; needed by completep. Of the Text VAE that of its encoder, and of its
    decoder."""

    @model_validator(mode="after")
    def _consistent(self) -> "ParametrizationConfig":
        needed = {"standard": (), "mup": ("base_width",), "completep": ("base_width", "base_depth")}[self.kind]
        for key in needed:
            if getattr(self, key) is None:
                raise ValueError(f"kind={self.kind} needs {key}, the size at which the learning rate was tuned")
        return self

    @property
    def has_depth(self) -> bool:
        """Whether start and rates follow from the depth as well."""
        return self.kind == "completep"


def without_parametrization(tree: dict[str, Any]) -> dict[str, Any]:
    """A plain tree of sections without these: what is left says which function the weights are of."""
    return {
        key: without_parametrization(value) if isinstance(value, dict) else value
        for key, value in tree.items()
        if key != "parametrization"
    }
