"""Held-out texts as the model in training continues them: greedily, each text for one document.

There is no cache: every token is a pass of the whole chain, which any layout runs, over few and short texts. Texts and
prompts are fixed, so that what is written compares over steps and between runs.

Shapes: K texts, L tokens, W tokens of a pass.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from cola_megatron.families.autoregressive.chain import Autoregressive
from cola_megatron.families.chain_pass import ChainPass
from cola_megatron.families.texts import Continuation, HeldOutText, given_and_end
from cola_megatron.layers.masks import AttentionMask
from cola_megatron.models.steps import Step
from cola_megatron.models.transformer_steps import transformer_steps, whole_logits
from cola_megatron.parallel.sequence_parts import whole_sequence


def write_texts(model: Autoregressive, texts_KL: np.ndarray, on_pass: Callable[[], None]) -> Sequence[HeldOutText]:
    """How the model goes on with these texts; every rank calls it, and gets the same."""
    groups, transformer = model.groups, model.transformer
    count, length = texts_KL.shape
    given, end = given_and_end(length)
    # Positions behind the text are seen by none of it; ranks cut what they divide.
    width = -(-end // groups.sequence_parts) * groups.sequence_parts
    tokens_KW = torch.zeros(count, width, dtype=torch.long, device=groups.device)
    tokens_KW[:, :given] = torch.from_numpy(texts_KL[:, :given].astype(np.int64))

    def choose(hidden_SBH: torch.Tensor) -> torch.Tensor:
        return whole_sequence(whole_logits(transformer, hidden_SBH).argmax(-1), groups)

    head = Step("hidden -> chosen", choose)
    run = ChainPass(model, list(transformer_steps(transformer, head)), ["chosen"], ["tokens", "context"])
    context = transformer.context(width, groups.device, AttentionMask(causal=True))
    for place in range(given, end):
        chosen_WK = run({"tokens": tokens_KW, "context": context}, tokens_KW.t())
        tokens_KW[:, place] = chosen_WK[place - 1]
        on_pass()
    found, truth = tokens_KW[:, given:end].tolist(), texts_KL[:, given:end].tolist()
    return [Continuation(*each) for each in zip(texts_KL[:, :given].tolist(), found, truth, strict=True)]
