"""Held-out texts as the model in training continues them: greedily, by low-confidence remasking.

There are no caches: every step is a pass of the whole chain, which any layout runs, over few and short texts. Texts and
prompts are fixed, so that what is written compares over steps and between runs.

Shapes: K texts, L tokens, W tokens of a pass, T of a block.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from cola_megatron.families.chain_pass import ChainPass
from cola_megatron.families.masked_diffusion.blocks import schedule
from cola_megatron.families.masked_diffusion.chain import MaskedDiffusion
from cola_megatron.families.texts import Continuation, HeldOutText, given_and_end
from cola_megatron.layers.masks import AttentionMask, block_causal_visibility
from cola_megatron.models.steps import Step
from cola_megatron.models.transformer_steps import transformer_steps, whole_logits
from cola_megatron.parallel.sequence_parts import whole_sequence

STEPS = 16
"""Of a continuation; by blocks, each has its share of them."""
STRIP_SHARES = 4
"""The first block is shown before its first step and at every fourth part of it."""


def write_texts(model: MaskedDiffusion, texts_KL: np.ndarray, on_pass: Callable[[], None]) -> Sequence[HeldOutText]:
    """How the model goes on with these texts; every rank calls it, and gets the same.

    The strip of a text is what the model would write for its first block, by the share that is still masked.
    """
    config, device = model.config, model.groups.device
    count, length = texts_KL.shape
    given, last = given_and_end(length)
    size = config.model.block_size
    end = last if size is None else min(-(-last // size) * size, length)
    whole_KL = torch.from_numpy(texts_KL.astype(np.int64)).to(device)
    tokens_KL = whole_KL[:, :end].clone()
    tokens_KL[:, given:] = config.model.mask_id
    predict = _predictions(model, end)
    strips: list[list[tuple[float, list[int]]]] = [[] for _ in range(count)]
    first = given if size is None else given // size * size
    for start in range(first, end, end - first if size is None else size):
        block = slice(start, end if size is None else start + size)
        masked = tokens = block.stop - max(start, given)
        steps = schedule(masked, end - given, STEPS)
        shown = {len(steps) * part // STRIP_SHARES for part in range(STRIP_SHARES)} if start == first else set()
        for step, kept in enumerate(steps):
            ids_KT, confidence_KT = (x_KL[:, block] for x_KL in predict(tokens_KL))
            on_pass()
            open_KT = tokens_KL[:, block] == config.model.mask_id
            if step in shown:
                written_KT = torch.where(open_KT, ids_KT, tokens_KL[:, block])[:, -tokens:]
                for strip, ids in zip(strips, written_KT.tolist(), strict=True):
                    strip.append((masked / tokens, ids))
            order_KT = confidence_KT.masked_fill(~open_KT, -torch.inf).argsort(descending=True, stable=True)
            chosen_Kn = order_KT[:, :kept]
            tokens_KL[:, block] = tokens_KL[:, block].scatter(1, chosen_Kn, ids_KT.gather(1, chosen_Kn))
            masked -= kept
        if start == first:
            for strip, ids in zip(strips, tokens_KL[:, block][:, -tokens:].tolist(), strict=True):
                strip.append((0.0, ids))
    found, truth = tokens_KL[:, given:last].tolist(), whole_KL[:, given:last].tolist()
    return [Continuation(*each) for each in zip(whole_KL[:, :given].tolist(), found, truth, strips, strict=True)]


def _predictions(model: MaskedDiffusion, end: int) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """(K, end) tokens -> the most likely token of each position, and the logarithm of its odds."""
    groups, transformer, config = model.groups, model.transformer, model.config.model
    # Positions behind the text are seen by none of it; ranks cut what they divide.
    width = -(-end // groups.sequence_parts) * groups.sequence_parts
    positions = torch.arange(width, device=groups.device)
    visible = block_causal_visibility(positions, positions, config.block_size or width) & (positions < end)
    context = transformer.context(width, groups.device, AttentionMask(visible))

    def choose(hidden_WKH: torch.Tensor) -> torch.Tensor:
        logits_WKV = whole_logits(transformer, hidden_WKH).float()
        if config.mask_token_id is not None:
            logits_WKV[..., config.mask_token_id] = -torch.inf
        best, ids = logits_WKV.max(-1, keepdim=True)
        odds = best - logits_WKV.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        of_own_part = torch.cat((ids, odds), dim=-1).double()  # in which an id is exact
        return whole_sequence(of_own_part, groups).movedim(-1, 0)

    head = Step("hidden -> chosen", choose)
    run = ChainPass(model, list(transformer_steps(transformer, head)), ["chosen"], ["tokens", "context"])

    def predict(tokens_KL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        count = len(tokens_KL)
        padded_KW = torch.nn.functional.pad(tokens_KL, (0, width - end))
        like = torch.zeros(2, width, count, dtype=torch.float64, device=groups.device)
        ids_WK, odds_WK = run({"tokens": padded_KW, "context": context}, like)
        return ids_WK[:end].t().long(), odds_WK[:end].t()

    return predict
