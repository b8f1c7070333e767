"""Cola DLM at other widths and depths: the prior is the network that is named, the VAE follows it in proportion."""

from cola_megatron.config import ColaConfig, ConfigError, DiTConfig, VAEConfig
from cola_megatron.families.sizes import (
    Coordinate,
    parametrized,
    scaled_feed_forward,
    scaled_heads,
    with_networks,
)


def scaled(config: ColaConfig, width: int, depth: int) -> ColaConfig:
    """Both stages of one size have the same VAE: it follows the prior in a stage 1 too.

    Args:
        width: `model.dit.hidden_size`; that of the VAE keeps its proportion to it.
        depth: `model.dit.num_layers`; encoder and decoder keep theirs, rounded, with at least one block.

    Raises:
        ConfigError: a width that is no whole number of heads in either network.
    """
    vae, dit = config.model.vae, config.model.dit
    vae_width, rest = divmod(vae.hidden_size * width, dit.hidden_size)
    if rest:
        raise ConfigError(
            f"width {width}: model.vae.hidden_size={vae.hidden_size} would be a fraction in the same proportion to "
            f"model.dit.hidden_size={dit.hidden_size}"
        )
    blocks = {name: max(1, round(getattr(vae, name) * depth / dit.num_layers)) for name in _STACKS}
    heads = scaled_heads("model.vae", vae.num_attention_heads, vae.hidden_size, vae_width)
    return with_networks(
        config,
        vae=vae.model_copy(
            update={
                **blocks,
                "hidden_size": vae_width,
                "ffn_hidden_size": scaled_feed_forward(vae.ffn_hidden_size, vae.hidden_size, vae_width),
                "num_attention_heads": heads,
            }
        ),
        dit=dit.model_copy(
            update={
                "num_layers": depth,
                "hidden_size": width,
                "num_attention_heads": scaled_heads("model.dit", dit.num_attention_heads, dit.hidden_size, width),
            }
        ),
    )


_STACKS = ("encoder_layers", "decoder_layers")


def with_parametrization(config: ColaConfig, kind: str) -> ColaConfig:
    """Both networks, each with its own sizes for its base."""
    vae: VAEConfig = parametrized(config.model.vae, kind, config.model.vae.encoder_layers)
    dit: DiTConfig = parametrized(config.model.dit, kind, config.model.dit.num_layers)
    return with_networks(config, vae=vae, dit=dit)


def coordinates(config: ColaConfig) -> tuple[Coordinate, ...]:
    """Of encoder and decoder, and in stage 2 of the prior."""
    post_norm = config.model.vae.post_norm
    branch = "ffn_norm" if post_norm else "ffn"
    # In the post-norm form attention reads the stream as it is, which before the first block has not been normed yet.
    behind = "1*" if post_norm else "*"

    def stack(name: str) -> tuple[Coordinate, ...]:
        return (
            Coordinate(
                f"{name} attention branch", f"vae.{name}.blocks.{behind}.attention", f"vae.{name}", of_branch=True
            ),
            Coordinate(f"{name} feed-forward branch", f"vae.{name}.blocks.*.{branch}", f"vae.{name}", of_branch=True),
            Coordinate(f"{name} residual stream", f"vae.{name}.blocks.-1", f"vae.{name}"),
        )

    vae = (
        Coordinate("encoder embedding", "vae.encoder.embedding", "vae.encoder"),
        Coordinate("encoder patches", "vae.encoder.patch", "vae.encoder"),
        *stack("encoder"),
        Coordinate("posterior", "vae.encoder.head", "vae.encoder"),
        Coordinate("decoder input", "vae.decoder.input", "vae.decoder"),
        *stack("decoder"),
        Coordinate("decoder logits", "vae.decoder.head", "vae.decoder"),
    )
    if config.stage == 1:
        return vae
    return (
        *vae,
        Coordinate("prior input", "dit.input", "dit"),
        Coordinate("prior time embedding", "dit.time_embedding", "dit"),
        Coordinate("prior attention", "dit.blocks.*.attention", "dit"),
        Coordinate("prior feed-forward", "dit.blocks.*.ffn", "dit"),
        Coordinate("prior branches, gated", "dit.blocks.*", "dit", of_branch=True, is_update=True),
        Coordinate("prior residual stream", "dit.blocks.-1", "dit", before_norm=True),
        Coordinate("velocity", "dit.output", "dit"),
    )
