"""Held-out texts as Cola DLM in training writes them: reconstructed in stage 1, continued in stage 2.

Texts, prompts and noise are fixed, so that what is written compares over steps and between runs.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from cola_megatron.config import ColaConfig
from cola_megatron.data import SampleSequence
from cola_megatron.families.cola.chain import Cola
from cola_megatron.families.cola.text_passes import TextPasses
from cola_megatron.families.texts import NEW_TOKENS, PROMPT_TOKENS, Continuation, HeldOutText, Reconstruction
from cola_megatron.inference.noise import block_noise
from cola_megatron.inference.settings import FlowSettings
from cola_megatron.objectives.samples import latent_positions, positions

RECONSTRUCTED_TOKENS = 96
"""How much of a reconstruction is kept. A continuation is given and written in whole blocks, at least one."""
MOST_BLOCKS = 8
"""Of a continuation, where blocks are small: each costs `SETTINGS.steps` passes."""
SETTINGS = FlowSettings(steps=16, guidance_scale=3.0, repetition_penalty=1.0)
STRIP_STEPS = (0, 4, 8, 12, SETTINGS.steps)
"""Steps of the solver at which the first block is decoded: at t = 1, 0.75, 0.5, 0.25 and 0."""


def write_texts(
    model: Cola, config: ColaConfig, texts_KL: np.ndarray, held_out: SampleSequence, on_pass: Callable[[], None]
) -> Sequence[HeldOutText]:
    """What the model makes of these texts; every rank calls it, and gets the same."""
    passes = TextPasses(model, on_pass)
    if config.stage == 2:
        return _continued(passes, config, texts_KL)
    fields = [positions(text, held_out.padding_id, held_out.end_of_text_id) for text in texts_KL]
    return _reconstructed(passes, config, fields)


def _reconstructed(passes: TextPasses, config: ColaConfig, texts: list[dict[str, np.ndarray]]) -> list[Reconstruction]:
    """Whole sequences, as they are measured; of each the first tokens that are no padding are kept."""
    device = passes.model.groups.device
    batch = {name: torch.from_numpy(np.stack([text[name] for text in texts])).to(device) for name in texts[0]}
    _, documents_KN = latent_positions(batch, config)
    found_KL = passes.decode(passes.encode(batch["tokens"], documents_KN), documents_KN).cpu().numpy()

    def kept(tokens_L: np.ndarray, counted_L: np.ndarray) -> list[int]:
        tokens: list[int] = tokens_L[counted_L][:RECONSTRUCTED_TOKENS].tolist()
        return tokens

    return [
        Reconstruction(kept(text["tokens"], text["counted"]), kept(found_L, text["counted"]))
        for text, found_L in zip(texts, found_KL, strict=True)
    ]


def _continued(passes: TextPasses, config: ColaConfig, tokens_KL: np.ndarray) -> list[Continuation]:
    device = passes.model.groups.device
    block_size, channels = config.model.dit.block_size, config.model.dit.latent_dim
    size = block_size * config.model.vae.patch_size
    given, new = _blocks(tokens_KL.shape[1], size)
    prompts, texts = tokens_KL[:, : given * size], len(tokens_KL)
    z_NKC = torch.zeros(0, texts, channels, device=device)
    if given:
        z_NKC = passes.encode(torch.from_numpy(prompts).to(device))

    def last_block(z_NKC: torch.Tensor) -> list[list[int]]:
        tokens: list[list[int]] = passes.decode(z_NKC)[:, -size:].tolist()
        return tokens

    found: list[list[int]] = [[] for _ in range(texts)]
    strips: list[list[tuple[float, list[int]]]] = [[] for _ in range(texts)]
    for block in range(new):
        noise = [block_noise(SETTINGS.noise_seed, text, block, (block_size, channels)) for text in range(texts)]
        for evaluation in passes.draw(z_NKC, torch.stack(noise, dim=1).to(device), SETTINGS):
            if block == 0 and evaluation.step in STRIP_STEPS:
                for strip, tokens in zip(strips, last_block(torch.cat((z_NKC, evaluation.clean))), strict=True):
                    strip.append((evaluation.time, tokens))
        z_NKC = torch.cat((z_NKC, evaluation.z))
        for whole, tokens in zip(found, last_block(z_NKC), strict=True):
            whole += tokens
    truth = tokens_KL[:, given * size : (given + new) * size].tolist()
    return [Continuation(*each) for each in zip(prompts.tolist(), found, truth, strips, strict=True)]


def _blocks(length: int, size: int) -> tuple[int, int]:
    """How many blocks of `size` tokens are given and written of a sequence; all that is written has a truth."""
    blocks = length // size
    given = min(max(1, min(PROMPT_TOKENS, length // 2) // size), blocks - 1)
    return given, min(max(1, NEW_TOKENS // size), MOST_BLOCKS, blocks - given)
