"""The VAE's two halves in generation: prompts to latents, and one block of latents after another to logits.

Shapes: S latents of one block, B batch, N positions of all prompts laid end to end, C latent channels, P tokens per
latent, V vocabulary.
"""

from collections.abc import Sequence

import torch

from cola_megatron.inference.cached_attention import MaskedBlocks, NewBlocks, PackedPrompts, blocks_for, packs
from cola_megatron.inference.kv_cache import KeyValueCache
from cola_megatron.layers.masks import AttentionMask
from cola_megatron.models.text_vae import TextVAE
from cola_megatron.parallel.megatron import gather_from_tensor_model_parallel_region


def encode_prompts(vae: TextVAE, prompts: Sequence[list[int]], device: torch.device) -> list[torch.Tensor]:
    """Posterior means in the prior's coordinates, (tokens / P, C) each; prompts are padded to what the encoder takes.

    All prompts are laid end to end in one pass: none is padded to the length of another.
    """
    encoder, patch_size = vae.encoder, vae.config.patch_size
    found = [torch.zeros(0, vae.config.latent_dim, device=device) for _ in prompts]
    for pack in packs([len(prompt) // patch_size for prompt in prompts]):
        lengths = [len(prompts[sample]) // patch_size for sample in pack]
        attention = PackedPrompts(lengths, vae.config.block_size, device)
        tokens_1N = torch.tensor([[token for sample in pack for token in prompts[sample]]], device=device)
        context = encoder.context_at(attention.positions, AttentionMask(), attention)
        mean_N1C = encoder.posterior(encoder.run_blocks(encoder.embed(tokens_1N), context)).mean
        for sample, z_NC in zip(pack, vae.to_prior(mean_N1C)[:, 0].split(lengths), strict=True):
            found[sample] = z_NC
    return found


class BlockDecoder:
    """The conditional decoder p(x | z), one block of every sample at a time, with a cache that begins empty."""

    def __init__(self, vae: TextVAE, block_size: int):
        self.decoder, self.block_size = vae.decoder, block_size
        self.vocab_size = vae.encoder.mask_token_id
        self.device = next(vae.parameters()).device
        self.cache = KeyValueCache()

    def admit(self, prompts: Sequence[torch.Tensor], capacity: int) -> None:
        """Further samples: their prompts' latents (n, C), from position 0 on; the logits of those are not needed.

        Args:
            capacity: latents of the longest of them, prompt and generation together.
        """
        before = len(self.cache.lengths)
        self.cache.add(len(prompts), capacity)
        for pack in packs([len(z_NC) for z_NC in prompts]):
            lengths, rows = [len(prompts[sample]) for sample in pack], [before + sample for sample in pack]
            attention = PackedPrompts(lengths, self.decoder.config.block_size, self.device, self.cache, rows)
            self._hidden(torch.cat([prompts[sample] for sample in pack])[:, None], attention.positions, attention)
        self.cache.advance([0] * before + [len(z_NC) for z_NC in prompts])

    def decode(self, z_SBC: torch.Tensor, commit: bool = True) -> torch.Tensor:
        """Logits (B, S * P, V) of the next block, float32.

        Args:
            commit: the block becomes part of what later ones see; False: it was only an estimate.
        """
        attention = blocks_for(self.device)(self.cache, self.block_size, self.decoder.config.block_size, self.device)
        logits_BTV = self._logits(z_SBC, attention)
        if commit:
            self.cache.advance([self.block_size] * z_SBC.shape[1])
        return logits_BTV

    def look(self, z_SNC: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
        """Logits (N, S * P, V) of estimates of the next block of some samples; nothing is committed."""
        size, decoder = self.block_size, self.decoder
        if blocks_for(self.device) is not NewBlocks:
            z_SBC = z_SNC.new_zeros(len(z_SNC), len(self.cache.lengths), z_SNC.shape[-1])
            z_SBC[:, list(samples)] = z_SNC
            return self.decode(z_SBC, commit=False)[list(samples)]
        return self._logits(z_SNC, NewBlocks(self.cache, size, decoder.config.block_size, self.device, samples))

    def keep(self, rows: Sequence[int]) -> None:
        """Drops every sample but these."""
        self.cache.keep(rows)

    def arrange(self, rows: Sequence[int]) -> None:
        """Puts the samples into this order."""
        self.cache.arrange(rows)

    def _logits(self, z_SBC: torch.Tensor, attention: NewBlocks | MaskedBlocks) -> torch.Tensor:
        logits_TBV = self.decoder.logits(self._hidden(z_SBC, attention.positions_SB, attention))
        logits_TBV = gather_from_tensor_model_parallel_region(logits_TBV, group=self.decoder.groups.tensor_group)
        return logits_TBV[..., : self.vocab_size].transpose(0, 1).float()

    def _hidden(self, z_SBC: torch.Tensor, positions: torch.Tensor, attention) -> torch.Tensor:
        decoder = self.decoder
        return decoder.run_blocks(decoder.embed(z_SBC), decoder.context_at(positions, AttentionMask(), attention))
