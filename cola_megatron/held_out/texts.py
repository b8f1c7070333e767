"""Held-out texts as a model in training writes them: reconstructed in stage 1, continued in stage 2.

Texts, prompts and noise are fixed, so that what is written compares over steps and between runs.
"""

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cola_megatron.config import RunConfig
from cola_megatron.data import TokenShards, held_out_samples, read_tokenizer
from cola_megatron.errors import UserError
from cola_megatron.held_out.text_passes import TextPasses
from cola_megatron.inference.noise import block_noise
from cola_megatron.inference.settings import FlowSettings
from cola_megatron.inference.text_stream import Decode, TextStream, following
from cola_megatron.models.cola import Cola
from cola_megatron.objectives.samples import latent_positions, positions

logger = logging.getLogger(__name__)

PROMPT_TOKENS, NEW_TOKENS, RECONSTRUCTED_TOKENS = 48, 32, 96
"""In whole blocks, at least one: how much is given at most, and written; and how much of a reconstruction is kept."""
MOST_BLOCKS = 8
"""Of a continuation, where blocks are small: each costs `SETTINGS.steps` passes."""
SETTINGS = FlowSettings(steps=16, guidance_scale=3.0, repetition_penalty=1.0)
STRIP_STEPS = (0, 4, 8, 12, SETTINGS.steps)
"""Steps of the solver at which the first block is decoded: at t = 1, 0.75, 0.5, 0.25 and 0."""

Marked = list[tuple[str, bool]]
"""A text in pieces; True: its tokens are the original's."""


@dataclass(frozen=True)
class Continuation:
    """How a text goes on, in token ids."""

    prompt: list[int]
    found: list[int]
    truth: list[int]
    strip: list[tuple[float, list[int]]] = field(default_factory=list)
    """(t, tokens) of the first block: what the decoder reads from the estimate z_t - t v of its clean latents."""

    def readable(self, decode: Decode) -> dict[str, Any]:
        """For a record."""
        after = following(decode, self.prompt)
        return {
            "prompt": decode(self.prompt),
            "continuation": after(self.found),
            "truth": after(self.truth),
            "strip": [{"t": time, "text": after(tokens)} for time, tokens in self.strip],
        }


@dataclass(frozen=True)
class Reconstruction:
    """The beginning of a text and what the decoder makes of its posterior mean, in token ids."""

    original: list[int]
    found: list[int]

    def readable(self, decode: Decode) -> dict[str, Any]:
        """For a record."""
        right = [one == other for one, other in zip(self.original, self.found, strict=True)]
        return {
            "tokens": len(right),
            "wrong": right.count(False),
            "original": marked(decode, self.original, right),
            "reconstruction": marked(decode, self.found, right),
        }


@torch.no_grad()
def held_out_texts(
    model: Cola, shards: TokenShards, config: RunConfig, count: int, on_pass: Callable[[], None] = lambda: None
) -> Sequence[Continuation | Reconstruction]:
    """The first texts of the measured sequences, as the model writes them; every rank calls it, and gets the same.

    Args:
        on_pass: called after every pass of a network.
    """
    held_out = held_out_samples(shards, skip_bad=config.data.bad_shards == "skip")
    texts = [next(held_out.read(place, 1)).tokens for place in range(min(count, len(shards)))]
    found: Sequence[Continuation | Reconstruction] = []
    if texts:
        model.eval()
        passes = TextPasses(model, on_pass)
        if config.stage == 1:
            fields = [positions(text, held_out.padding_id, held_out.end_of_text_id) for text in texts]
            found = _reconstructed(passes, config, fields)
        else:
            found = _continued(passes, config, np.stack(texts))
        model.train()
    return found


def _reconstructed(passes: TextPasses, config: RunConfig, texts: list[dict[str, np.ndarray]]) -> list[Reconstruction]:
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


def _continued(passes: TextPasses, config: RunConfig, tokens_KL: np.ndarray) -> list[Continuation]:
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


def marked(decode: Decode, tokens: Sequence[int], right: Sequence[bool]) -> Marked:
    """The text in pieces of tokens that are all right or all wrong.

    A character that spans a border belongs to the piece in which it ends.
    """
    stream, pieces = TextStream(decode), []
    for is_right, run in itertools.groupby(zip(tokens, right, strict=True), key=lambda pair: pair[1]):
        pieces.append((stream.add([token for token, _ in run]), is_right))
    if pieces and (rest := stream.end()):
        pieces[-1] = (pieces[-1][0] + rest, pieces[-1][1])
    return pieces


def decoder_for(file: Path | None) -> Decode:
    """Token ids to text, by the tokenizer of a run; without one the ids themselves, and a line in the log."""
    try:
        if file is not None and file.is_file():
            tokenizer = read_tokenizer(file)
            return lambda tokens: tokenizer.decode(tokens, skip_special_tokens=False)
        reason = "the run has no tokenizer"
    except UserError as error:
        reason = str(error)
    logger.warning("%s: texts are written as token ids", reason)
    return lambda tokens: "".join(f"{token} " for token in tokens)
