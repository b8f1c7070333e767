"""Published tensor names and shapes <-> ours, with the reshape between them where the layout differs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cola_megatron.config import DiTConfig, VAEConfig
from cola_megatron.layers.mlp import swiglu_groups

Shape = tuple[int, ...]


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True)
class Rule:
    """One tensor: its published name and shape, and the two inverse reshapes."""

    published: str
    shape: Shape
    to_ours: Callable[[torch.Tensor], torch.Tensor] = _same
    to_published: Callable[[torch.Tensor], torch.Tensor] = _same

    @property
    def our_shape(self) -> Shape:
        """Shape of the whole tensor in our state dict."""
        return tuple(self.to_ours(torch.empty(self.shape, device="meta")).shape)


def vae_rules(config: VAEConfig, vocab_size: int) -> dict[str, Rule]:
    """Every parameter of `TextVAE` by our name."""
    hidden, patch, latent = config.hidden_size, config.patch_size, config.latent_dim
    posterior = 2 * latent if config.variational else latent
    rules = {
        "encoder.embedding.weight": Rule("encoder.wte.weight", (vocab_size + 1, hidden)),
        "encoder.patch.weight": Rule(
            "encoder.patch_embedder.weight",
            (hidden, hidden, patch),
            # convolution (out, in, kernel) <-> linear over a patch (out, kernel * in)
            lambda weight: weight.permute(0, 2, 1).flatten(1),
            lambda weight: weight.unflatten(1, (patch, -1)).permute(0, 2, 1),
        ),
        "encoder.patch.bias": Rule("encoder.patch_embedder.bias", (hidden,)),
        **_linear("decoder.unpatch", "decoder.unpatch_layer", (patch * hidden, hidden)),
        **_norm("decoder.norm", "decoder.final_norm", hidden),
        **_linear("encoder.head", "encoder.final_layer", (posterior, hidden), config.bias),
        **_linear("decoder.input", "decoder.in_layer", (hidden, latent), config.bias),
        **_linear("decoder.head.linear", "decoder.final_layer", (vocab_size, hidden), config.bias),
    }
    for part, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        for layer in range(layers):
            rules |= _text_block(f"{part}.blocks.{layer}", config)
    return rules


def dit_rules(config: DiTConfig) -> dict[str, Rule]:
    """Every parameter of `DiT` by our name."""
    hidden, inner, latent = config.hidden_size, config.ffn_hidden_size, config.latent_dim
    heads, width = config.num_attention_heads, config.num_attention_heads * config.head_dim
    rules = {
        **_linear("input", "txt_in.proj", (hidden, latent)),
        **_linear("time_embedding.input", "emb_in.proj_in", (hidden, config.time_embedding_dim)),
        **_linear("time_embedding.hidden", "emb_in.proj_hid", (hidden, hidden)),
        **_linear("time_embedding.output", "emb_in.proj_out", (hidden, hidden)),
        **_norm("output_norm", "txt_out_norm", hidden),
        **_linear("output_shift_scale.linear", "txt_out_ada.out_in.1", (2 * hidden, hidden)),
        **_linear("output", "txt_out.proj", (latent, hidden)),
    }
    for layer in range(config.num_layers):
        block = f"blocks.{layer}"
        rules |= {
            **_fused(f"{block}.attention.qkv", f"{block}.msa.proj_qkv", (3 * width, hidden), 3, heads, config.qkv_bias),
            **_linear(f"{block}.attention.output", f"{block}.msa.proj_out", (hidden, width), config.qkv_bias),
            **_linear(f"{block}.ffn.input", f"{block}.mlp.proj_in", (inner, hidden)),
            **_linear(f"{block}.ffn.output", f"{block}.mlp.proj_out", (hidden, inner)),
        }
        for ours, published in (("query_norm", "norm_q"), ("key_norm", "norm_k")):
            rules |= _norm(f"{block}.attention.{ours}", f"{block}.msa.{published}", config.head_dim)
        for ours, published in (("attention", "msa"), ("ffn", "mlp")):
            adaptive = f"{block}.ada.{published}"
            rules |= _linear(f"{block}.{ours}_shift_scale.linear", f"{adaptive}_in.1", (2 * hidden, hidden))
            rules |= _linear(f"{block}.{ours}_gate.linear", f"{adaptive}_out.1", (hidden, hidden))
    return rules


def _text_block(block: str, config: VAEConfig) -> dict[str, Rule]:
    hidden, inner, heads = config.hidden_size, config.ffn_hidden_size, config.num_attention_heads
    ffn_groups = swiglu_groups(heads, inner)
    rules = {
        **_fused(f"{block}.attention.qkv", f"{block}.qkv_proj", (3 * hidden, hidden), 3, heads, config.qkv_bias),
        **_linear(f"{block}.attention.output", f"{block}.attn_out_proj", (hidden, hidden), config.bias),
        **_norm(f"{block}.ffn_norm", f"{block}.norm_ffn", hidden),
        **_fused(f"{block}.ffn.input", f"{block}.ffn_proj", (inner, hidden), 2, ffn_groups, config.bias),
        **_linear(f"{block}.ffn.output", f"{block}.ffn_out", (hidden, inner // 2), config.bias),
    }
    if config.norm_affine:
        rules |= _norm(f"{block}.attention_norm", f"{block}.norm_attn", hidden)
    if config.query_key_norm and config.query_key_norm_affine:
        rules |= _norm(f"{block}.attention.query_norm", f"{block}.q_norm", hidden)
        rules |= _norm(f"{block}.attention.key_norm", f"{block}.k_norm", hidden)
    return rules


def _linear(ours: str, published: str, shape: Shape, bias: bool = True) -> dict[str, Rule]:
    """weight and bias under the same two names."""
    rules = {f"{ours}.weight": Rule(f"{published}.weight", shape)}
    return rules | {f"{ours}.bias": Rule(f"{published}.bias", shape[:1])} if bias else rules


def _norm(ours: str, published: str, size: int) -> dict[str, Rule]:
    """The affine parameters of a norm."""
    return {f"{ours}.{kind}": Rule(f"{published}.{kind}", (size,)) for kind in ("weight", "bias")}


def _fused(ours: str, published: str, shape: Shape, parts: int, groups: int, bias: bool) -> dict[str, Rule]:
    """Fused projections: published rows are (parts, groups, channels), ours (groups, parts, channels)."""

    def swap(first: int, second: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda tensor: tensor.unflatten(0, (first, second, -1)).transpose(0, 1).flatten(0, 2)

    to_ours, to_published = swap(parts, groups), swap(groups, parts)
    return {
        name: Rule(rule.published, rule.shape, to_ours, to_published)
        for name, rule in _linear(ours, published, shape, bias).items()
    }
