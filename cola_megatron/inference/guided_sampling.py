"""Guided sampling of one text, as the paper states it (section 2.3): the definition, without caches.

    z^(b) at t = 1 ~ N(0, I),   dz/dt = v_uncond + s (v_cond - v_uncond)   down to t = 0, on a uniform grid by Euler,

where v_cond sees the clean latents of all blocks before b and v_uncond sees block b alone. Then the decoder reads the
tokens of the block from all latents so far, and the block becomes context. `inference/generate.py` computes the same
for batches of prompts of any length, with caches and both passes in one; `tests/test_golden.py` compares the two.

Shapes: S latents, C channels, T tokens, V vocabulary; the batch of one stands where B would.
"""

import itertools
from collections.abc import Sequence

import torch

from cola_megatron.inference.noise import block_noise
from cola_megatron.inference.settings import FlowSettings
from cola_megatron.models.dit import DiT
from cola_megatron.models.text_vae import TextVAE


@torch.no_grad()
def sample_text(
    vae: TextVAE, dit: DiT, prompt: Sequence[int], settings: FlowSettings, sample: int = 0
) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens behind the prompt, and their latents (blocks * S, C).

    Args:
        prompt: token ids of whole blocks (what is done with a rest is in `inference/first_block.py`), at least one.
        settings: `steps`, `guidance_scale`, `max_new_tokens` (whole blocks) and `noise_seed` are read.
        sample: the id that the noise is drawn for.
    """
    block_size, tokens = dit.config.block_size, dit.config.block_size * vae.config.patch_size
    device = next(dit.parameters()).device
    z0_S1C = vae.to_prior(vae.encoder(torch.tensor([list(prompt)], device=device)).mean)
    context, ids = len(z0_S1C), []
    for block in range(settings.max_new_tokens // tokens):
        z_S1C = block_noise(settings.noise_seed, sample, block, (block_size, z0_S1C.shape[-1])).to(device)[:, None]
        for now, later in itertools.pairwise(torch.linspace(1.0, 0.0, settings.steps + 1).tolist()):
            t = torch.tensor([[now]], device=device)
            alone = dit.two_copy_velocity(z_S1C[:0], z_S1C, t)
            in_context = dit.two_copy_velocity(z0_S1C, torch.cat((z0_S1C, z_S1C)), t)[-block_size:]
            velocity = alone + settings.guidance_scale * (in_context - alone)
            z_S1C = z_S1C - (now - later) * velocity
        z0_S1C = torch.cat((z0_S1C, z_S1C))
        logits_T1V = vae.decoder(z0_S1C)[-tokens:]
        ids += logits_T1V.argmax(-1).flatten().tolist()
    return ids, z0_S1C[context:, 0]
