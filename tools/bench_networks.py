"""The networks that `tools/bench_inference.py` measures, with random weights."""

from __future__ import annotations

import argparse

import torch

from cola_megatron.config import DiTConfig, VAEConfig
from cola_megatron.config.transformer import TransformerConfig
from cola_megatron.models.dit import DiT
from cola_megatron.models.text_vae import TextVAE
from cola_megatron.models.transformer import Transformer
from cola_megatron.parallel import ProcessGroups, initialize_parameters


def networks(options: argparse.Namespace, groups: ProcessGroups, dtype: torch.dtype) -> tuple[TextVAE, DiT]:
    """VAE and prior with random weights, moved away from their start: there AdaLN's gates are zero."""
    width = options.width
    vae = TextVAE(
        options.vocab_size,
        VAEConfig(
            encoder_layers=2,
            decoder_layers=2,
            hidden_size=width,
            ffn_hidden_size=4 * width,
            num_attention_heads=width // 64,
        ),
        groups,
    )
    dit = DiT(
        DiTConfig(
            num_layers=options.layers,
            hidden_size=width,
            num_attention_heads=width // 64,
            head_dim=64,
            rotary_dim=48,
            block_size=options.block_size,
        ),
        groups,
    )
    for network in (vae, dit):
        initialize_parameters(network, 0, groups)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        network.to(groups.device, dtype).eval().requires_grad_(False)
    return vae, dit


def transformer(options: argparse.Namespace, groups: ProcessGroups) -> Transformer:
    """An autoregressive model of the same width and depth, with random weights."""
    width = options.width
    config = TransformerConfig(
        num_layers=options.layers,
        hidden_size=width,
        ffn_hidden_size=8 * width // 3 // 16 * 16,
        num_attention_heads=width // 64,
    )
    model = Transformer(options.vocab_size, config, groups)
    initialize_parameters(model, 0, groups)
    return model.to(groups.device, getattr(torch, options.dtype)).eval().requires_grad_(False)
