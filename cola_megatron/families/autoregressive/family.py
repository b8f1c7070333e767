"""The autoregressive language model as one object."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from cola_megatron.config.autoregressive import AutoregressiveConfig
from cola_megatron.costs.part import Part, causal_pairs
from cola_megatron.families.autoregressive.page import PAGE
from cola_megatron.families.autoregressive.settings import AutoregressiveSettings, ExactLikelihoodSettings
from cola_megatron.families.family import Mode
from cola_megatron.families.sizes import TRANSFORMER_COORDINATES, Coordinate
from cola_megatron.families.transformer_costs import TransformerCosts
from cola_megatron.families.transformer_family import TransformerFamily

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cola_megatron.data import SampleSequence
    from cola_megatron.families.autoregressive.chain import Autoregressive
    from cola_megatron.families.autoregressive.measurement import NextTokenMeasurement
    from cola_megatron.families.texts import HeldOutText
    from cola_megatron.inference.text_model import TextModel
    from cola_megatron.interop.weight_source import ModelSource, WeightFormat
    from cola_megatron.parallel import ProcessGroups


class AutoregressiveFamily(TransformerFamily[AutoregressiveConfig]):
    """A LLaMA-shaped transformer that predicts the next token."""

    name = "autoregressive"
    title = "Autoregressive transformer"
    settings = AutoregressiveSettings
    likelihood_settings = ExactLikelihoodSettings
    page = PAGE

    def sample_draws(self, config: AutoregressiveConfig, sample_index: int, step: int) -> dict[str, NDArray[Any]]:
        """Nothing is random."""
        return {}

    def build(
        self, config: AutoregressiveConfig, groups: ProcessGroups, split: Sequence[int] | None = None
    ) -> Autoregressive:
        """See `chain.Autoregressive`."""
        from cola_megatron.families.autoregressive.chain import Autoregressive

        return Autoregressive(config, groups, split)

    def loss_weights(self, config: AutoregressiveConfig) -> dict[str, float]:
        """There is one term."""
        from cola_megatron.families.autoregressive.loss import LOSS_WEIGHTS

        return LOSS_WEIGHTS

    def parts(self, config: AutoregressiveConfig, mode: Mode | None = None) -> tuple[Part, ...]:
        """See `families/transformer_costs.py`."""
        length = config.data.sequence_length
        masks = config.training.micro_batch_size if config.data.document_attention else 0
        transformer = config.model.transformer
        return TransformerCosts(config, transformer, length, causal_pairs(length, 1), masks=masks).parts()

    def coordinates(self, config: AutoregressiveConfig) -> Sequence[Coordinate]:
        """Of the transformer, and its input."""
        return (Coordinate("token embedding", "transformer.embedding", "transformer"), *TRANSFORMER_COORDINATES)

    def measurement(self, config: AutoregressiveConfig, extras: Collection[str] = ()) -> NextTokenMeasurement:
        """See `measurement.NextTokenMeasurement`."""
        from cola_megatron.families.autoregressive.measurement import NextTokenMeasurement

        return NextTokenMeasurement()

    def write_texts(
        self,
        model: Autoregressive,
        config: AutoregressiveConfig,
        texts_KL: np.ndarray,
        held_out: SampleSequence,
        on_pass: Callable[[], None],
    ) -> Sequence[HeldOutText]:
        """See `texts.write_texts`."""
        from cola_megatron.families.autoregressive.texts import write_texts

        return write_texts(model, texts_KL, on_pass)

    @property
    def formats(self) -> Sequence[WeightFormat]:
        """The Hugging Face folder."""
        from cola_megatron.families.autoregressive.huggingface import HuggingFaceLlamaFormat

        return (HuggingFaceLlamaFormat(),)

    def load(self, source: ModelSource, **options: Any) -> TextModel:
        """An `AutoregressiveLM`."""
        from cola_megatron.families.autoregressive.language_model import AutoregressiveLM

        return AutoregressiveLM.from_source(source, **options)
