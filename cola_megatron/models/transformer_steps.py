"""The shared transformer as steps of a chain: what every family that has one puts between its batch and its loss.

Shapes as in `models/transformer.py`.
"""

from collections.abc import Iterator

import torch

from cola_megatron.layers.masks import block_causal_mask
from cola_megatron.layers.packed_documents import Kernel
from cola_megatron.models.steps import Step
from cola_megatron.models.transformer import Transformer
from cola_megatron.parallel.megatron import gather_from_tensor_model_parallel_region


def context_step(
    transformer: Transformer, length: int, *, causal: bool, by_document: bool, kernel: Kernel | None
) -> Step:
    """-> context, the same in every pass; or documents -> context, in which no position sees another document.

    Args:
        length: positions of a sequence.
        causal: no position sees a later one; False: all see all.
        kernel: of attention inside documents; None: a mask.
    """
    block_size, device = 1 if causal else length, transformer.groups.device
    if not by_document:
        context = transformer.context(length, device, block_causal_mask(length, block_size, device))
        return Step("-> context", lambda: context)
    return Step(
        "documents -> context",
        lambda documents_BL: transformer.context(
            length, device, block_causal_mask(length, block_size, device, documents_BL, kernel)
        ),
    )


def transformer_steps(
    transformer: Transformer, head: Step, tokens: str = "tokens", recompute: bool = False
) -> Iterator[Step]:
    """Token ids under the name `tokens`, context -> hidden, and then `head`, which holds last norm and vocabulary.

    Args:
        recompute: blocks are computed again in the backward pass.
    """
    yield embedding_step(transformer, tokens)
    yield from block_steps(transformer, recompute)
    yield as_head(transformer, head)


def embedding_step(transformer: Transformer, tokens: str = "tokens") -> Step:
    """Token ids -> hidden."""
    return Step(f"{tokens} -> hidden", transformer.embed, part="transformer.embed", modules=[transformer.embedding])


def block_steps(transformer: Transformer, recompute: bool = False) -> Iterator[Step]:
    """hidden, context -> hidden."""
    for block in transformer.blocks:
        yield Step("hidden, context -> hidden", block, part="transformer.block", modules=[block], recompute=recompute)


def as_head(transformer: Transformer, head: Step) -> Step:
    """The step as the one that holds last norm and vocabulary: `transformer.logits` or `weighted_nll` in it."""
    head.part, head.modules = "transformer.head", (transformer.norm, transformer.head)
    return head


def whole_logits(transformer: Transformer, hidden_SBH: torch.Tensor) -> torch.Tensor:
    """What the head makes of the last block, over the whole vocabulary on every rank, of the rank's part of the
    sequence: (S, B, H) -> (P, B, V)."""
    logits_PBV = transformer.logits(hidden_SBH)
    if transformer.groups.tensor_parallel_size == 1:
        return logits_PBV
    return gather_from_tensor_model_parallel_region(logits_PBV)[..., : transformer.vocab_size]
