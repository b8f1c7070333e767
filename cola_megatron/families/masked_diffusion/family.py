"""Masked diffusion as one object."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from cola_megatron.config.masked_diffusion import MaskedDiffusionConfig, MaskedDiffusionModelConfig
from cola_megatron.costs.part import Part, pairs_in_products, two_copy_pairs
from cola_megatron.families.family import Mode
from cola_megatron.families.masked_diffusion.page import PAGE
from cola_megatron.families.masked_diffusion.settings import BoundSettings, MaskedDiffusionSettings
from cola_megatron.families.sizes import TRANSFORMER_COORDINATES, Coordinate
from cola_megatron.families.transformer_costs import TransformerCosts
from cola_megatron.families.transformer_family import TransformerFamily

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cola_megatron.data import SampleSequence
    from cola_megatron.families.masked_diffusion.chain import MaskedDiffusion
    from cola_megatron.families.masked_diffusion.measurement import MaskedDiffusionMeasurement
    from cola_megatron.families.texts import HeldOutText
    from cola_megatron.inference.text_model import TextModel
    from cola_megatron.interop.weight_source import ModelSource, WeightFormat
    from cola_megatron.parallel import ProcessGroups


class MaskedDiffusionFamily(TransformerFamily[MaskedDiffusionConfig]):
    """A transformer that predicts masked tokens: LLaDA, or by blocks BD3-LM."""

    name = "masked_diffusion"
    title = "Masked diffusion"
    settings = MaskedDiffusionSettings
    likelihood_settings = BoundSettings
    page = PAGE

    def sample_draws(self, config: MaskedDiffusionConfig, sample_index: int, step: int) -> dict[str, NDArray[Any]]:
        """See `draws.sample_draws`."""
        from cola_megatron.families.masked_diffusion import draws

        return draws.sample_draws(config, sample_index, step)

    def build(
        self, config: MaskedDiffusionConfig, groups: ProcessGroups, split: Sequence[int] | None = None
    ) -> MaskedDiffusion:
        """See `chain.MaskedDiffusion`."""
        from cola_megatron.families.masked_diffusion.chain import MaskedDiffusion

        return MaskedDiffusion(config, groups, split)

    def loss_weights(self, config: MaskedDiffusionConfig) -> dict[str, float]:
        """There is one term."""
        from cola_megatron.families.masked_diffusion.loss import LOSS_WEIGHTS

        return LOSS_WEIGHTS

    def parts(self, config: MaskedDiffusionConfig, mode: Mode | None = None) -> tuple[Part, ...]:
        """See `families/transformer_costs.py`."""
        length, block = config.data.sequence_length, config.block_size
        per_sample = config.data.document_attention or config.objective.random_length_share > 0
        by_blocks, chunk = block < length, config.training.attention_chunk or 0
        return TransformerCosts(
            config,
            config.model.transformer,
            config.network_length,
            two_copy_pairs(length, block) if by_blocks else float(length * length),
            extra_rows=config.model.extra_rows,
            head_positions=length,
            pairs_in_products=pairs_in_products(length, block, chunk) if by_blocks else None,
            masks=config.training.micro_batch_size if per_sample else int(by_blocks),
        ).parts()

    def coordinates(self, config: MaskedDiffusionConfig) -> Sequence[Coordinate]:
        """Of the transformer, and its input."""
        return (Coordinate("token embedding", "transformer.embedding", "transformer"), *TRANSFORMER_COORDINATES)

    def measurement(self, config: MaskedDiffusionConfig, extras: Collection[str] = ()) -> MaskedDiffusionMeasurement:
        """See `measurement.MaskedDiffusionMeasurement`."""
        from cola_megatron.families.masked_diffusion.measurement import MaskedDiffusionMeasurement

        return MaskedDiffusionMeasurement(config)

    def write_texts(
        self,
        model: MaskedDiffusion,
        config: MaskedDiffusionConfig,
        texts_KL: np.ndarray,
        held_out: SampleSequence,
        on_pass: Callable[[], None],
    ) -> Sequence[HeldOutText]:
        """See `texts.write_texts`."""
        from cola_megatron.families.masked_diffusion.texts import write_texts

        return write_texts(model, texts_KL, on_pass)

    @property
    def formats(self) -> Sequence[WeightFormat]:
        """LLaDA's folder."""
        from cola_megatron.families.masked_diffusion.llada import LLaDAFormat

        return (LLaDAFormat(),)

    def load(self, source: ModelSource, **options: Any) -> TextModel:
        """A `MaskedDiffusionLM`."""
        from cola_megatron.families.masked_diffusion.language_model import MaskedDiffusionLM

        return MaskedDiffusionLM.from_source(source, **options)

    def block_tokens(self, config: MaskedDiffusionConfig) -> int:
        """Of one block of a model that has them; otherwise a continuation has any length."""
        return config.model.block_size or 1

    def input_sizes(self, config: MaskedDiffusionModelConfig) -> tuple[int, ...]:
        """Vocabulary, blocks, and which id is [MASK]."""
        return config.vocab_size, config.block_size or 0, config.mask_id
