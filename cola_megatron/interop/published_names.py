"""Published tensor names <-> ours, with the reshape between them where the layout differs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cola_megatron.config import DiTConfig, VAEConfig
from cola_megatron.layers.mlp import swiglu_groups


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True)
class Rule:
    """One tensor: its published name and the two inverse reshapes."""

    published: str
    to_ours: Callable[[torch.Tensor], torch.Tensor] = _same
    to_published: Callable[[torch.Tensor], torch.Tensor] = _same


def vae_rules(config: VAEConfig) -> dict[str, Rule]:
    """Every parameter of `TextVAE` by our name."""
    rules = {
        "encoder.embedding.weight": Rule("encoder.wte.weight"),
        "encoder.patch.weight": Rule(
            "encoder.patch_embedder.weight",
            # convolution (out, in, kernel) <-> linear over a patch (out, kernel * in)
            lambda weight: weight.permute(0, 2, 1).flatten(1),
            lambda weight: weight.unflatten(1, (config.patch_size, -1)).permute(0, 2, 1),
        ),
        "encoder.patch.bias": Rule("encoder.patch_embedder.bias"),
        "decoder.unpatch.weight": Rule("decoder.unpatch_layer.weight"),
        "decoder.unpatch.bias": Rule("decoder.unpatch_layer.bias"),
        "decoder.norm.weight": Rule("decoder.final_norm.weight"),
        "decoder.norm.bias": Rule("decoder.final_norm.bias"),
        **_linear("encoder.head", "encoder.final_layer", config.bias),
        **_linear("decoder.input", "decoder.in_layer", config.bias),
        **_linear("decoder.head.linear", "decoder.final_layer", config.bias),
    }
    for part, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        for layer in range(layers):
            block = f"{part}.blocks.{layer}"
            rules |= _text_block(block, config)
    return rules


def dit_rules(config: DiTConfig) -> dict[str, Rule]:
    """Every parameter of `DiT` by our name."""
    rules = {
        **_linear("input", "txt_in.proj"),
        **_linear("time_embedding.input", "emb_in.proj_in"),
        **_linear("time_embedding.hidden", "emb_in.proj_hid"),
        **_linear("time_embedding.output", "emb_in.proj_out"),
        "output_norm.weight": Rule("txt_out_norm.weight"),
        "output_norm.bias": Rule("txt_out_norm.bias"),
        **_linear("output_shift_scale.linear", "txt_out_ada.out_in.1"),
        **_linear("output", "txt_out.proj"),
    }
    for layer in range(config.num_layers):
        block = f"blocks.{layer}"
        rules |= {
            **_fused(f"{block}.attention.qkv", f"{block}.msa.proj_qkv", 3, config.num_attention_heads, config.qkv_bias),
            **_linear(f"{block}.attention.output", f"{block}.msa.proj_out", config.qkv_bias),
            **_linear(f"{block}.ffn.input", f"{block}.mlp.proj_in"),
            **_linear(f"{block}.ffn.output", f"{block}.mlp.proj_out"),
        }
        for ours, published in (("query_norm", "norm_q"), ("key_norm", "norm_k")):
            rules |= _linear(f"{block}.attention.{ours}", f"{block}.msa.{published}")
        for ours, published in (("attention", "msa"), ("ffn", "mlp")):
            rules |= _linear(f"{block}.{ours}_shift_scale.linear", f"{block}.ada.{published}_in.1")
            rules |= _linear(f"{block}.{ours}_gate.linear", f"{block}.ada.{published}_out.1")
    return rules


def _text_block(block: str, config: VAEConfig) -> dict[str, Rule]:
    ffn_groups = swiglu_groups(config.num_attention_heads, config.ffn_hidden_size)
    rules = {
        **_fused(f"{block}.attention.qkv", f"{block}.qkv_proj", 3, config.num_attention_heads, config.qkv_bias),
        **_linear(f"{block}.attention.output", f"{block}.attn_out_proj", config.bias),
        **_linear(f"{block}.ffn_norm", f"{block}.norm_ffn"),
        **_fused(f"{block}.ffn.input", f"{block}.ffn_proj", 2, ffn_groups, config.bias),
        **_linear(f"{block}.ffn.output", f"{block}.ffn_out", config.bias),
    }
    if config.norm_affine:
        rules |= _linear(f"{block}.attention_norm", f"{block}.norm_attn")
    if config.query_key_norm and config.query_key_norm_affine:
        rules |= _linear(f"{block}.attention.query_norm", f"{block}.q_norm")
        rules |= _linear(f"{block}.attention.key_norm", f"{block}.k_norm")
    return rules


def _linear(ours: str, published: str, bias: bool = True) -> dict[str, Rule]:
    """weight and bias under the same two names (a norm's affine parameters as well)."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return {f"{ours}.{kind}": Rule(f"{published}.{kind}") for kind in kinds}


def _fused(ours: str, published: str, parts: int, groups: int, bias: bool) -> dict[str, Rule]:
    """Fused projections: published rows are (parts, groups, channels), ours (groups, parts, channels)."""

    def swap(first: int, second: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda tensor: tensor.unflatten(0, (first, second, -1)).transpose(0, 1).flatten(0, 2)

    to_ours, to_published = swap(parts, groups), swap(groups, parts)
    kinds = ("weight", "bias") if bias else ("weight",)
    return {f"{ours}.{kind}": Rule(f"{published}.{kind}", to_ours, to_published) for kind in kinds}
