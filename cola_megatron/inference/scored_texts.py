"""Texts that a model is asked about: their tokens, batches of equal length, and the decoder's logits for them.

Shapes: B batch, L tokens with padding, S = L / P latents, P tokens per latent, C latent channels, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from cola_megatron.inference.requests import read_sample_ids, read_token_ids, require_several
from cola_megatron.inference.text_stream import following
from cola_megatron.models.text_vae import TextVAE
from cola_megatron.parallel.megatron import gather_from_tensor_model_parallel_region


class Text(NamedTuple):
    """One text as the model sees it."""

    token_ids: tuple[int, ...]
    sample_id: int
    """All draws for this text depend on this and on the seed."""


class ScoredText(NamedTuple):
    """A text that is asked about, and what goes before it."""

    context_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    sample_id: int
    text_bytes: int | None
    """Of the text without its context, UTF-8; None: token ids without a tokenizer."""
    text_words: int | None


class TextBatch(NamedTuple):
    """Texts of one padded length."""

    members: list[int]
    """Indices of the texts."""
    tokens_BL: torch.Tensor
    lengths: list[int]
    """Tokens of each before its padding."""


def read_texts(
    texts: Sequence[str | Sequence[int]],
    contexts: Sequence[str | Sequence[int]] | None,
    ids: Sequence[int] | None,
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str] | None,
    vocab_size: int,
) -> list[ScoredText]:
    """Tokens and sizes of texts.

    A text after a context has the tokens that it has in the joint text, where these begin with the context's tokens;
    otherwise both are encoded for themselves.

    Args:
        contexts: one for each text, or None.
        encode: text -> token ids.
        decode: token ids -> text, for the sizes of texts given as ids; None: they stay unknown.

    Raises:
        ValueError: a text without tokens, numbers that do not match, ids or token ids out of range.
    """
    for name, given in (("texts", texts), ("contexts", contexts)):
        require_several(name, given)
    sample_ids = read_sample_ids("texts", len(texts), ids)
    contexts = [()] * len(texts) if contexts is None else contexts
    if len(contexts) != len(texts):
        raise ValueError(f"{len(texts)} texts but {len(contexts)} contexts")
    found = []
    for index, (text, context, sample_id) in enumerate(zip(texts, contexts, sample_ids, strict=True)):
        context_ids = read_token_ids(f"contexts[{index}]", context, encode, vocab_size)
        token_ids = read_token_ids(f"texts[{index}]", text, encode, vocab_size)
        if not token_ids:
            raise ValueError(f"texts[{index}] has no tokens")
        if isinstance(text, str) and isinstance(context, str):
            joint_ids = encode(context + text)
            if joint_ids[: len(context_ids)] == context_ids and len(joint_ids) > len(context_ids):
                token_ids = joint_ids[len(context_ids) :]
        spelled = text if isinstance(text, str) else following(decode, context_ids)(token_ids) if decode else None
        sizes = (None, None) if spelled is None else (len(spelled.encode(errors="replace")), len(spelled.split()))
        found.append(ScoredText(tuple(context_ids), tuple(token_ids), sample_id, *sizes))
    return found


def batches(
    texts: Sequence[Text], unit: int, size: int, padding_id: int | None, device: torch.device
) -> Iterator[TextBatch]:
    """At most `size` texts at a time, all of one length after padding: no result depends on its neighbours.

    The longest come first: what does not fit in memory shows at once.

    Args:
        unit: texts are filled up to a multiple of so many tokens.

    Raises:
        ValueError: a text has to be filled up, and there is no `padding_id`.
    """
    by_length = defaultdict(list)
    for index, text in enumerate(texts):
        by_length[-(-len(text.token_ids) // unit) * unit].append(index)
    for length in sorted(by_length, reverse=True):
        for start in range(0, len(by_length[length]), size):
            members = by_length[length][start : start + size]
            lengths = [len(texts[index].token_ids) for index in members]
            if padding_id is None and min(lengths) < length:
                raise ValueError(f"texts that are no multiple of {unit} tokens need a padding_id")
            rows = [
                [*texts[index].token_ids, *[padding_id] * (length - len(texts[index].token_ids))] for index in members
            ]
            yield TextBatch(members, torch.tensor(rows, device=device), lengths)


def rows_of_logits(vae: TextVAE, z_SBC: torch.Tensor) -> Iterator[torch.Tensor]:
    """The decoder's logits (L, V) of one row after the other, float32: those of all rows would take much memory."""
    decoder = vae.decoder
    context = decoder.context(z_SBC.shape[0], z_SBC.device)
    for hidden_S1H in decoder.run_blocks(decoder.embed(z_SBC), context).split(1, dim=1):
        logits_L1V = gather_from_tensor_model_parallel_region(
            decoder.logits(hidden_S1H), group=decoder.groups.tensor_group
        )
        yield logits_L1V[:, 0, : vae.encoder.mask_token_id].float()


def token_nll(logits_LV: torch.Tensor, tokens_L: torch.Tensor, length: int) -> torch.Tensor:
    """-log p(token|z) of the first `length` tokens, in nats, float64."""
    return F.cross_entropy(logits_LV[:length], tokens_L[:length], reduction="none").double()
