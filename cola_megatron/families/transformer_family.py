"""What families share whose model is one transformer (`config.model.transformer`) behind an input of their own."""

from __future__ import annotations

from cola_megatron.config.transformer import TransformerConfig
from cola_megatron.families.family import BackboneShape, Config, Family
from cola_megatron.families.sizes import parametrized, scaled_transformer, with_networks


class TransformerFamily(Family[Config]):
    """Other sizes and parametrisations are those of the transformer."""

    def scaled(self, config: Config, width: int, depth: int) -> Config:
        """See `sizes.scaled_transformer`."""
        return with_networks(config, transformer=scaled_transformer(_transformer(config), width, depth))

    def with_parametrization(self, config: Config, kind: str) -> Config:
        """See `sizes.parametrized`."""
        transformer = _transformer(config)
        return with_networks(config, transformer=parametrized(transformer, kind, transformer.num_layers))

    def backbone_shape(self, config: Config) -> BackboneShape:
        """Width and blocks."""
        transformer = _transformer(config)
        return BackboneShape(transformer.hidden_size, transformer.num_layers)


def _transformer(config: Config) -> TransformerConfig:
    section = getattr(config.model, "transformer", None)
    assert isinstance(section, TransformerConfig), "a family of one transformer has its section"
    return section
