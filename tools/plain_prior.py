"""The prior's training pass as one would write it first: what `tools/bench_prior.py` compares the model with.

Both copies are whole. Attention is one product under a mask of all pairs. AdaLN is evaluated for every token. The
weights are those of a `DiT`, the equations its own; nothing of its code runs.

Shapes: S positions (clean copy, then noisy copy), L latents of a copy, B batch, C channels, H hidden, A heads, D head
channels, N blocks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F

from cola_megatron.models.dit import DiT


def plain_velocity(dit: DiT, clean_BLC: torch.Tensor, noisy_BLC: torch.Tensor, times_BN: torch.Tensor) -> torch.Tensor:
    """v(z_t, t; z0^(<b)) of every block b, (B, L, C)."""
    config = dit.config
    length, blocks = noisy_BLC.shape[1], times_BN.shape[1]
    times_BL = times_BN.repeat_interleave(length // blocks, dim=1)
    silu_time_BSH = F.silu(_time(dit, torch.cat((torch.zeros_like(times_BL), times_BL), dim=1)))
    visible_SS = _mask(length, config.block_size, noisy_BLC.device)
    positions_S = torch.arange(length, device=noisy_BLC.device).repeat(2)
    x_BSH = _linear(dit.input, torch.cat((clean_BLC, noisy_BLC), dim=1))
    for block in dit.blocks:
        x_BSH = _block(block, x_BSH, silu_time_BSH, visible_SS, positions_S, dit)
    shift, scale = _linear(dit.output_shift_scale.linear, silu_time_BSH).chunk(2, dim=-1)
    x_BSH = F.layer_norm(x_BSH, x_BSH.shape[-1:], dit.output_norm.weight, dit.output_norm.bias, config.norm_eps)
    return _linear(dit.output, x_BSH * (1 + scale) + shift)[:, length:]


def _block(
    block: Any,
    x_BSH: torch.Tensor,
    silu_time_BSH: torch.Tensor,
    visible_SS: torch.Tensor,
    positions_S: torch.Tensor,
    dit: DiT,
) -> torch.Tensor:
    def modulated(x_BSH: torch.Tensor, shift_scale: Any) -> torch.Tensor:
        shift, scale = _linear(shift_scale.linear, silu_time_BSH).chunk(2, dim=-1)
        return F.layer_norm(x_BSH, x_BSH.shape[-1:], eps=dit.config.norm_eps) * (1 + scale) + shift

    attention = block.attention
    qkv_BSAXD = _linear(attention.qkv, modulated(x_BSH, block.attention_shift_scale)).unflatten(
        -1, (dit.config.num_attention_heads, 3, dit.config.head_dim)
    )
    q_BASD, k_BASD, v_BASD = (x.transpose(1, 2) for x in qkv_BSAXD.unbind(-2))
    q_BASD, k_BASD = (
        _rotated(
            F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, dit.config.norm_eps),
            positions_S,
            dit.config.rotary_dim,
            dit.config.rotary_base,
        )
        for x, norm in ((q_BASD, attention.query_norm), (k_BASD, attention.key_norm))
    )
    seen_BASD = F.scaled_dot_product_attention(q_BASD, k_BASD, v_BASD, attn_mask=visible_SS)
    branch_BSH = _linear(attention.output, seen_BASD.transpose(1, 2).flatten(2))
    x_BSH = x_BSH + _linear(block.attention_gate.linear, silu_time_BSH) * branch_BSH
    inner = F.gelu(_linear(block.ffn.input, modulated(x_BSH, block.ffn_shift_scale)), approximate="tanh")
    return x_BSH + _linear(block.ffn_gate.linear, silu_time_BSH) * _linear(block.ffn.output, inner)


def _linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, layer.weight, layer.bias)


def _time(dit: DiT, times_BS: torch.Tensor) -> torch.Tensor:
    embedding, half = dit.time_embedding, dit.time_embedding.sinusoid_dim // 2
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half, dtype=torch.float64) / half).float()
    angles = 1000.0 * times_BS[..., None] * frequencies.to(times_BS.device)
    x = torch.cat((angles.sin(), angles.cos()), dim=-1)
    return _linear(embedding.output, F.silu(_linear(embedding.hidden, F.silu(_linear(embedding.input, x)))))


def _mask(length: int, block_size: int, device: torch.device) -> torch.Tensor:
    """Boolean (S, S): a clean query sees clean blocks up to its own, a noisy one earlier clean blocks and its own."""
    block = torch.arange(length, device=device).repeat(2) // block_size
    noisy = torch.arange(2 * length, device=device) >= length
    query, key = block[:, None], block[None, :]
    of_clean = ~noisy[None, :] & (key <= query)
    of_noisy = (~noisy[None, :] & (key < query)) | (noisy[None, :] & (key == query))
    return torch.where(noisy[:, None], of_noisy, of_clean)


def _rotated(x_BASD: torch.Tensor, positions_S: torch.Tensor, rotary_dim: int, base: float) -> torch.Tensor:
    exponents = torch.arange(0, rotary_dim, 2, device=x_BASD.device) / rotary_dim
    angles_SD = positions_S[:, None] / base**exponents
    even, odd = x_BASD[..., :rotary_dim].unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles_SD.cos(), angles_SD.sin()
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((rotated, x_BASD[..., rotary_dim:]), dim=-1)
