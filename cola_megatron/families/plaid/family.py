"""Plaid as one object."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from cola_megatron.config.plaid import PlaidConfig
from cola_megatron.costs.part import Part
from cola_megatron.families.family import Mode
from cola_megatron.families.plaid.page import PAGE
from cola_megatron.families.plaid.parts import chain_parts
from cola_megatron.families.plaid.settings import BoundSettings, PlaidSettings
from cola_megatron.families.sizes import TRANSFORMER_COORDINATES, Coordinate
from cola_megatron.families.transformer_family import TransformerFamily

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cola_megatron.data import SampleSequence
    from cola_megatron.families.plaid.chain import Plaid
    from cola_megatron.families.plaid.measurement import PlaidMeasurement
    from cola_megatron.families.texts import HeldOutText
    from cola_megatron.inference.text_model import TextModel
    from cola_megatron.interop.weight_source import ModelSource, WeightFormat
    from cola_megatron.parallel import ProcessGroups


class PlaidFamily(TransformerFamily[PlaidConfig]):
    """Continuous diffusion over learned embeddings of the tokens, in one stage."""

    name = "plaid"
    title = "Plaid"
    settings = PlaidSettings
    likelihood_settings = BoundSettings
    page = PAGE
    formats: Sequence[WeightFormat] = ()

    def sample_draws(self, config: PlaidConfig, sample_index: int, step: int) -> dict[str, NDArray[Any]]:
        """See `draws.plaid_draws`."""
        from cola_megatron.families.plaid.draws import plaid_draws

        return plaid_draws(
            config.objective,
            config.seed,
            config.training.global_batch_size,
            config.data.sequence_length,
            config.model.diffusion.embedding_dim,
            sample_index,
            step,
        )

    def build(self, config: PlaidConfig, groups: ProcessGroups, split: Sequence[int] | None = None) -> Plaid:
        """See `chain.Plaid`."""
        from cola_megatron.families.plaid.chain import Plaid

        return Plaid(config, groups, split)

    def loss_weights(self, config: PlaidConfig) -> dict[str, float]:
        """The three terms of the bound."""
        from cola_megatron.families.plaid.loss import LOSS_WEIGHTS

        return LOSS_WEIGHTS

    def parts(self, config: PlaidConfig, mode: Mode | None = None) -> tuple[Part, ...]:
        """See `parts.chain_parts`."""
        return chain_parts(config)

    def coordinates(self, config: PlaidConfig) -> Sequence[Coordinate]:
        """Of the transformer, and its input."""
        return (Coordinate("noisy input", "plaid.input", "transformer"), *TRANSFORMER_COORDINATES)

    def measurement(self, config: PlaidConfig, extras: Collection[str] = ()) -> PlaidMeasurement:
        """See `measurement.PlaidMeasurement`; there are no extras."""
        from cola_megatron.families.plaid.measurement import PlaidMeasurement

        return PlaidMeasurement(config)

    def write_texts(
        self,
        model: Plaid,
        config: PlaidConfig,
        texts_KL: np.ndarray,
        held_out: SampleSequence,
        on_pass: Callable[[], None],
    ) -> Sequence[HeldOutText]:
        """See `texts.write_texts`."""
        from cola_megatron.families.plaid.texts import write_texts

        return write_texts(model, texts_KL, on_pass)

    def load(self, source: ModelSource, **options: Any) -> TextModel:
        """A `PlaidLM`."""
        from cola_megatron.families.plaid.plaid_lm import PlaidLM

        return PlaidLM.from_source(source, **options)

    def input_sizes(self, config: Any) -> tuple[int, ...]:
        """Vocabulary and channels."""
        return config.vocab_size, config.diffusion.embedding_dim
