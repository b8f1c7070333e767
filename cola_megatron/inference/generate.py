"""Block-wise generation: encode the prompt, draw latent blocks, decode each (paper section 2.3).

Shapes: B batch, S latents of one block, C latent channels, P tokens per latent, V vocabulary.
"""

import math
import numbers
from dataclasses import dataclass

import torch

from cola_megatron.inference.kv_cache import KeyValueCache
from cola_megatron.inference.prior import BlockPrior
from cola_megatron.inference.sampling import choose_tokens, penalize_repetition
from cola_megatron.models.dit import DiT
from cola_megatron.models.text_vae import TextVAE

# So that every seed of a block (see `block_noise`) fits a torch.Generator.
MAX_NOISE_SEED, MAX_SAMPLE_ID = 2**62, 2**52
GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class GenerationSettings:
    """How to generate. A temperature below 1e-5 is 0: greedy, as in the published package.

    Raises:
        ValueError: a setting out of range.
    """

    steps: int = 16
    guidance_scale: float = 7.0
    max_new_tokens: int = 32
    temperature: float = 0.0
    repetition_penalty: float = 1.1
    noise_seed: int = 66

    def __post_init__(self):
        for name in ("steps", "max_new_tokens", "noise_seed"):
            if not isinstance(getattr(self, name), numbers.Integral):
                raise ValueError(f"{name}={getattr(self, name)} must be an integer")
        for name in ("guidance_scale", "temperature", "repetition_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} must be finite")
        for name, least in (("steps", 1), ("max_new_tokens", 1), ("temperature", 0.0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be above 0")
        if abs(self.noise_seed) > MAX_NOISE_SEED:
            raise ValueError(f"noise_seed={self.noise_seed} must lie in -{MAX_NOISE_SEED} .. {MAX_NOISE_SEED}")
        if self.temperature < GREEDY_BELOW:
            object.__setattr__(self, "temperature", 0.0)


@dataclass(frozen=True)
class GeneratedBlocks:
    """One sample: whole blocks as generated, the prompt's part of the first block included.

    `token_ids` (blocks * block_size * P,), `latents` (blocks, block_size, C) float32, both on the CPU;
    `prompt_tokens`: how many of the ids repeat the end of the prompt.
    """

    token_ids: torch.Tensor
    latents: torch.Tensor
    prompt_tokens: int


def block_noise(seed: int, sample_id: int, block: int, shape: tuple[int, int]) -> torch.Tensor:
    """The noise of one block, a function of (seed, sample id, block) alone: a sample does not depend on its batch."""
    generator = torch.Generator().manual_seed(seed + sample_id * 1_000 + block * 10_000_000)
    return torch.randn(shape, generator=generator)


@torch.no_grad()
def generate_blocks(
    vae: TextVAE,
    dit: DiT,
    prompts: list[list[int]],
    sample_ids: list[int],
    padding_id: int,
    settings: GenerationSettings,
) -> list[GeneratedBlocks]:
    """Continues token-id prompts.

    A prompt that does not fill its last block is padded; the latents that hold prompt tokens are kept clean in the
    first generated block (clean-condition repaint), and that block counts towards `max_new_tokens`.
    """
    device = next(dit.parameters()).device
    block_size, patch = dit.config.block_size, vae.config.patch_size
    block_tokens = block_size * patch
    blocks = -(-settings.max_new_tokens // block_tokens)
    latents = [_encode_padded(vae, prompt, block_tokens, padding_id, device) for prompt in prompts]
    counts = [-(-len(prompt) // patch) for prompt in prompts]  # latents that hold prompt tokens
    whole = [count // block_size * block_size for count in counts]

    capacity = max(whole) + blocks * block_size
    prior = BlockPrior(dit, len(prompts), capacity, settings.steps, settings.guidance_scale)
    decoder = _CachedDecoder(vae, len(prompts), capacity, device)
    prefix_SBC = torch.zeros(max(whole), len(prompts), dit.config.latent_dim, device=device)
    held_SB = torch.zeros(block_size, len(prompts), dtype=torch.bool, device=device)
    clean_SBC = torch.zeros(block_size, len(prompts), dit.config.latent_dim, device=device)
    for sample, (z_SC, count, start) in enumerate(zip(latents, counts, whole, strict=True)):
        prefix_SBC[:start, sample] = z_SC[:start]
        held_SB[: count - start, sample] = True
        clean_SBC[: count - start, sample] = z_SC[start:count]
    real_B = torch.tensor(whole, device=device)
    prior.remember(prefix_SBC, real_B)
    decoder.remember(prefix_SBC, real_B)

    seen_BV = torch.zeros(len(prompts), _vocab_size(vae), dtype=torch.bool, device=device)
    ids, drawn = [], []
    for block in range(blocks):
        noise = [
            block_noise(settings.noise_seed, sample, block, (block_size, dit.config.latent_dim))
            for sample in sample_ids
        ]
        z_SBC = prior.draw(torch.stack(noise, dim=1).to(device), held_SB, clean_SBC)
        logits_BTV = penalize_repetition(decoder.decode(z_SBC), seen_BV, settings.repetition_penalty)
        ids_BT = choose_tokens(logits_BTV, settings.temperature, _token_generators(settings, sample_ids, block))
        seen_BV.scatter_(1, ids_BT, True)
        ids.append(ids_BT)
        drawn.append(z_SBC)
        held_SB = torch.zeros_like(held_SB)
        if block + 1 < blocks:
            prior.remember(z_SBC)
    ids_BT, drawn_NSBC = torch.cat(ids, dim=1).cpu(), torch.stack(drawn).cpu()
    return [
        GeneratedBlocks(ids_BT[sample], drawn_NSBC[:, :, sample], len(prompt) - start * patch)
        for sample, (prompt, start) in enumerate(zip(prompts, whole, strict=True))
    ]


class _CachedDecoder:
    """The conditional decoder, one block at a time."""

    def __init__(self, vae: TextVAE, batch: int, capacity: int, device: torch.device):
        self.decoder = vae.decoder
        self.cache = KeyValueCache(batch, capacity, device)

    def remember(self, z_SBC: torch.Tensor, real_B: torch.Tensor) -> None:
        """Commits the prompt's whole blocks; their logits are not needed."""
        if z_SBC.shape[0]:
            self._hidden(z_SBC, real_B)

    def decode(self, z_SBC: torch.Tensor) -> torch.Tensor:
        """Commits one block and returns its logits (B, S * P, V), float32."""
        return self.decoder.logits(self._hidden(z_SBC)).transpose(0, 1).float()

    def _hidden(self, z_SBC: torch.Tensor, real_B: torch.Tensor | None = None) -> torch.Tensor:
        positions, mask = self.cache.place(z_SBC.shape[0], self.decoder.config.block_size, real_B)
        hidden = self.decoder.run_blocks(
            self.decoder.embed(z_SBC), self.decoder.context_at(positions, mask, self.cache)
        )
        self.cache.commit()
        return hidden


def _encode_padded(
    vae: TextVAE, prompt: list[int], block_tokens: int, padding_id: int, device: torch.device
) -> torch.Tensor:
    """Posterior mean in the prior's coordinates, (latents, C), of a prompt padded to whole blocks."""
    padded = prompt + [padding_id] * (-len(prompt) % block_tokens)
    if not padded:
        return torch.zeros(0, vae.config.latent_dim, device=device)
    return vae.to_prior(vae.encoder(torch.tensor([padded], device=device)).mean)[:, 0]


def _vocab_size(vae: TextVAE) -> int:
    return vae.encoder.mask_token_id


def _token_generators(settings: GenerationSettings, sample_ids: list[int], block: int) -> list[torch.Generator] | None:
    if settings.temperature == 0.0:
        return None
    # One past the latent noise's seeds, so that tokens and latents are drawn independently.
    return [
        torch.Generator().manual_seed(settings.noise_seed + sample * 1_000 + block * 10_000_000 + 5_000_000_000_000)
        for sample in sample_ids
    ]
