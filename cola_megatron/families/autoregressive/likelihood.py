"""log p(text | context), exact: the sum of the log-probabilities of the text's tokens.

A text without a context follows the padding id, which by default is the token that ends documents, as in generation.

Shapes: B texts, L tokens, n of them scored, H hidden, V vocabulary.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from cola_megatron.inference.likelihood_terms import Kind, Progress
from cola_megatron.inference.scored_texts import ScoredText
from cola_megatron.layers.masks import AttentionMask
from cola_megatron.models.transformer import Transformer
from cola_megatron.models.transformer_steps import whole_logits


@dataclass(frozen=True)
class ExactLikelihood:
    """log p(text | context) in nats (`inference.likelihood_terms.TextLikelihood`)."""

    figures: ClassVar[Mapping[str, str]] = {"elbo": "log p, exact"}

    log_likelihood: float
    is_greedy: bool
    """Whether greedy decoding after the context would write exactly this text."""
    tokens: int
    """Of the text without its context; so are the next two."""
    text_bytes: int | None
    """UTF-8; None: token ids without a tokenizer."""
    text_words: int | None
    """Parted by white space."""

    @property
    def elbo(self) -> float:
        """The bound that other families give; here it is exact."""
        return self.log_likelihood

    @property
    def elbo_error(self) -> float:
        """Nothing is drawn."""
        return 0.0

    @property
    def kind(self) -> Kind:
        """log p itself."""
        return "exact"

    @property
    def perplexity(self) -> float:
        """exp(-log p / tokens)."""
        return math.exp(-self.log_likelihood / self.tokens)

    @property
    def bits_per_byte(self) -> float | None:
        """-log p / (bytes log 2)."""
        return -self.log_likelihood / (self.text_bytes * math.log(2)) if self.text_bytes else None

    def as_json(self) -> dict[str, Any]:
        """The figures."""
        names = ("log_likelihood", "elbo", "is_greedy", "tokens", "text_bytes", "text_words")
        return {name: getattr(self, name) for name in names}


@torch.no_grad()
def exact_likelihoods(
    transformer: Transformer,
    texts: Sequence[ScoredText],
    padding_id: int | None,
    batch_size: int,
    progress: Progress | None = None,
) -> list[ExactLikelihood]:
    """One likelihood per text, in their order.

    Args:
        padding_id: stands before a text without a context.
        batch_size: texts in one pass; all of one length, so that no result depends on it.

    Raises:
        ValueError: a text without a context, and no `padding_id`.
    """
    found: dict[int, ExactLikelihood] = {}
    for members in _of_one_length(texts, padding_id, batch_size):
        whole = [_context(texts[index], padding_id) + texts[index].token_ids for index in members]
        tokens_BL = torch.tensor(whole, device=next(transformer.parameters()).device)
        context = transformer.context(tokens_BL.shape[1] - 1, tokens_BL.device, AttentionMask(causal=True))
        hidden_LBH = transformer.run_blocks(transformer.embed(tokens_BL[:, :-1]), context)
        for row, index in enumerate(members):
            text = texts[index]
            scored, targets_n = len(text.token_ids), tokens_BL[row, -len(text.token_ids) :]
            # The logits of one text at a time: those of a batch would take much memory.
            logits_nV = whole_logits(transformer, hidden_LBH[-scored:, row : row + 1])[:, 0].float()
            nll = F.cross_entropy(logits_nV, targets_n, reduction="none").double().sum().item()
            greedy = bool((logits_nV.argmax(-1) == targets_n).all())
            found[index] = ExactLikelihood(-nll, greedy, scored, text.text_bytes, text.text_words)
        if progress is not None:
            progress(len(found), len(texts))
    return [found[index] for index in range(len(texts))]


def _context(text: ScoredText, padding_id: int | None) -> tuple[int, ...]:
    if text.context_ids:
        return text.context_ids
    if padding_id is None:
        raise ValueError("a text without a context needs padding_id, the token that its first one follows")
    return (padding_id,)


def _of_one_length(texts: Sequence[ScoredText], padding_id: int | None, size: int) -> Iterator[list[int]]:
    """Indices of at most `size` texts at a time, alike in length with their contexts; the longest first."""
    by_length = defaultdict(list)
    for index, text in enumerate(texts):
        by_length[len(_context(text, padding_id)) + len(text.token_ids)].append(index)
    for length in sorted(by_length, reverse=True):
        for start in range(0, len(by_length[length]), size):
            yield by_length[length][start : start + size]
