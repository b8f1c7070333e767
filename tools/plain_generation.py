"""Generation as one would write it first: what `tools/bench_inference.py` compares the engine with.

Two passes per step of the solver, one after the other. Keys and values are concatenated: the cached ones with the
block's own in every conditional pass, and for good when a block is finished. AdaLN is evaluated for every position of
every pass. Prompts must have one length, in whole blocks. The networks and their equations are the model's own.

Shapes: S latents of one block, B batch, C latent channels, L tokens, T tokens of one block, A heads, D head channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from cola_megatron.inference.noise import block_noise
from cola_megatron.inference.sampling import choose_tokens, penalize_repetition
from cola_megatron.inference.settings import FlowSettings
from cola_megatron.layers.attention import attend
from cola_megatron.layers.masks import AttentionMask, block_causal_visibility
from cola_megatron.layers.time_embedding import TimeRows
from cola_megatron.models.dit import DiT, TimeTable
from cola_megatron.models.text_vae import TextVAE


class ConcatenatedCache:
    """Keys and values of all positions so far, grown by concatenation."""

    def __init__(self, block_size: int):
        self.block_size, self.length, self.commits = block_size, 0, False
        self.layers: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
        self.mask = AttentionMask()

    def place(self, new: int, device: torch.device, commits: bool) -> torch.Tensor:
        """Positions of `new` latents behind the cache; `commits`: this pass stays in it."""
        self.commits = commits
        positions = torch.arange(self.length, self.length + new, device=device)
        keys = torch.arange(self.length + new, device=device)
        visible = block_causal_visibility(positions, keys, self.block_size)
        self.mask = AttentionMask(None if visible.all() else visible)
        self.length += new if commits else 0
        return positions

    def attend(
        self, layer: nn.Module, q_SBAD: torch.Tensor, k_SBAD: torch.Tensor, v_SBAD: torch.Tensor
    ) -> torch.Tensor:
        """See `layers.attention.KeyValueStore`."""
        if layer in self.layers:
            keys, values = self.layers[layer]
            k_SBAD, v_SBAD = torch.cat((keys, k_SBAD)), torch.cat((values, v_SBAD))
        if self.commits:
            self.layers[layer] = k_SBAD, v_SBAD
        return attend(q_SBAD, k_SBAD, v_SBAD, self.mask)


@torch.no_grad()
def generate_plainly(
    vae: TextVAE, dit: DiT, prompts: Sequence[Sequence[int]], settings: FlowSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, tokens) and latents (blocks, S, B, C) of greedy Euler generation; sample i has id i."""
    device, block_size = next(dit.parameters()).device, dit.config.block_size
    prior, decoder = ConcatenatedCache(block_size), ConcatenatedCache(vae.config.block_size)
    prompt_SBC = vae.to_prior(vae.encoder(torch.tensor(prompts, device=device)).mean)
    velocity(dit, prompt_SBC, 0.0, prior, commits=True)
    decode(vae, prompt_SBC, decoder)
    times = torch.linspace(1.0, 0.0, settings.steps + 1).tolist()
    seen_BV = torch.zeros(len(prompts), vae.encoder.mask_token_id, dtype=torch.bool, device=device)
    ids, latents = [], []
    blocks = settings.max_new_tokens // (block_size * vae.config.patch_size)
    for block in range(blocks):
        shape = (block_size, dit.config.latent_dim)
        noise = [block_noise(settings.noise_seed, sample, block, shape) for sample in range(len(prompts))]
        z_SBC = torch.stack(noise, dim=1).to(device)
        for now, later in itertools.pairwise(times):
            alone = velocity(dit, z_SBC, now, None)
            in_context = velocity(dit, z_SBC, now, prior)
            z_SBC = z_SBC - (alone + settings.guidance_scale * (in_context - alone)) * (now - later)
        logits_BTV = decode(vae, z_SBC, decoder)
        ids_BT = choose_tokens(penalize_repetition(logits_BTV, seen_BV, settings.repetition_penalty), 0.0)
        seen_BV.scatter_(1, ids_BT, True)
        ids.append(ids_BT)
        latents.append(z_SBC)
        if block + 1 < blocks:
            velocity(dit, z_SBC, 0.0, prior, commits=True)
    return torch.cat(ids, dim=1), torch.stack(latents)


def velocity(
    dit: DiT, z_SBC: torch.Tensor, time: float, cache: ConcatenatedCache | None, commits: bool = False
) -> torch.Tensor:
    """One pass, conditional through a cache or unconditional, with a row of the time table for every position."""
    size, batch, _ = z_SBC.shape
    rows = torch.arange(size * batch, device=z_SBC.device)
    table = TimeTable(torch.full(rows.shape, time, device=z_SBC.device), TimeRows(rows.view(size, batch)))
    if cache is None:
        return dit(z_SBC, table, dit.context_at(torch.arange(size, device=z_SBC.device), AttentionMask()))
    positions = cache.place(size, z_SBC.device, commits)
    return dit(z_SBC, table, dit.context_at(positions, AttentionMask(), cache))


def decode(vae: TextVAE, z_SBC: torch.Tensor, cache: ConcatenatedCache) -> torch.Tensor:
    """Logits (B, T, V) of new latents, which stay in the cache."""
    decoder = vae.decoder
    positions = cache.place(len(z_SBC), z_SBC.device, commits=True)
    hidden = decoder.run_blocks(decoder.embed(z_SBC), decoder.context_at(positions, AttentionMask(), cache))
    return decoder.logits(hidden).transpose(0, 1).float()
