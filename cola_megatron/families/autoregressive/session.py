"""Generation: one token of every sample after another, through a cache.

A prompt without tokens is begun from the padding id, which by default is the token that ends documents: after it
training predicts how the next one begins. A session's results are those of each prompt alone: samples of different
lengths share matrices, never a padded width (`inference/cached_attention.py`).

Shapes: B running samples, N tokens of all prompts laid end to end, H hidden, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from cola_megatron.families.autoregressive.settings import AutoregressiveSettings
from cola_megatron.inference.cached_attention import MaskedBlocks, NewBlocks, PackedPrompts, blocks_for, packs
from cola_megatron.inference.fast_forward import prepare
from cola_megatron.inference.kv_cache import KeyValueCache
from cola_megatron.inference.noise import TOKEN_DRAWS, generator_of
from cola_megatron.inference.protocol import Request, TokenBlock
from cola_megatron.inference.sampling import choose_tokens, penalize_repetition
from cola_megatron.layers.masks import AttentionMask
from cola_megatron.models.transformer import Transformer
from cola_megatron.models.transformer_steps import whole_logits


class AutoregressiveGenerator:
    """The family in inference: begins sessions.

    The transformer is prepared for inference (`inference/fast_forward.py`); it must be in evaluation mode, without
    gradients.
    """

    def __init__(self, transformer: Transformer):
        self.transformer = transformer
        prepare(transformer, transformer.groups)

    def start(
        self, requests: Sequence[Request], settings: AutoregressiveSettings, padding_id: int
    ) -> "AutoregressiveSession":
        """Reads the prompts into the cache.

        Args:
            padding_id: stands before the first token of a prompt that has none.
        """
        return AutoregressiveSession(self.transformer, requests, settings, padding_id)


@dataclass
class _Sample:
    """One running sample; the batch is a list of these, in order of their prompts' length."""

    index: int
    """Of its request."""
    sample_id: int
    prompt: list[int]
    left: int
    """Tokens that are still to come."""


class AutoregressiveSession:
    """A batch under way (`inference.protocol.Session`). Nothing is generated in between, so there are no previews."""

    @torch.no_grad()
    def __init__(
        self, transformer: Transformer, requests: Sequence[Request], settings: AutoregressiveSettings, padding_id: int
    ):
        self.transformer, self.settings = transformer, settings
        self.device = next(transformer.parameters()).device
        self.generated = 0
        self._samples = _in_order(requests, settings, padding_id)
        batch = len(self._samples)
        self._seen_BV: torch.Tensor | None = None
        if settings.repetition_penalty != 1.0:
            self._seen_BV = torch.zeros(batch, transformer.vocab_size, dtype=torch.bool, device=self.device)
        # The last token of a prompt is the first that is read by a step; those before it are read here.
        before = [len(sample.prompt) - 1 for sample in self._samples]
        capacity = max((length + sample.left for length, sample in zip(before, self._samples, strict=True)), default=0)
        self._cache = KeyValueCache(batch, capacity)
        self._read(before)
        self._tokens_B1 = torch.tensor([sample.prompt[-1:] for sample in self._samples], device=self.device)

    @property
    def running(self) -> list[int]:
        """Samples that are not finished, as indices of their requests."""
        return sorted(sample.index for sample in self._samples)

    @torch.no_grad()
    def advance(self, preview_steps: Sequence[int] = ()) -> Iterator[TokenBlock]:
        """The next `tokens_at_once` tokens of every running sample, or as many as are left until one has its length."""
        if not self._samples:
            return
        count = min(self.settings.tokens_at_once, *(sample.left for sample in self._samples))
        ids_BT = torch.cat([self._next_tokens() for _ in range(count)], dim=1).tolist()
        blocks = []
        for sample, ids in zip(self._samples, ids_BT, strict=True):
            sample.left -= count
            blocks.append(TokenBlock(sample.index, ids, repeated=0, last=sample.left == 0))
        self.drop([block.sample for block in blocks if block.last])
        yield from blocks

    @torch.no_grad()
    def drop(self, samples: Sequence[int]) -> None:
        """Ends these samples: batch and cache close up."""
        rows = [row for row, sample in enumerate(self._samples) if sample.index not in samples]
        if len(rows) == len(self._samples):
            return
        self._samples = [self._samples[row] for row in rows]
        self._cache.keep(rows)
        rows_B = torch.tensor(rows, dtype=torch.long, device=self.device)
        self._tokens_B1 = self._tokens_B1[rows_B]
        if self._seen_BV is not None:
            self._seen_BV = self._seen_BV[rows_B]

    def _read(self, lengths: Sequence[int]) -> None:
        """Fills the cache with the first tokens of each prompt; no logits are needed of them."""
        for pack in packs(lengths):
            members = [self._samples[row].prompt[: lengths[row]] for row in pack]
            attention = PackedPrompts([len(prompt) for prompt in members], 1, self.device, self._cache, pack)
            tokens_1N = torch.tensor([[token for prompt in members for token in prompt]], device=self.device)
            self._hidden(tokens_1N, attention)
        self._cache.advance(lengths)

    def _next_tokens(self) -> torch.Tensor:
        """One more token of every sample, (B, 1)."""
        attention = blocks_for(self.device)(self._cache, 1, 1, self.device)
        logits_B1V = whole_logits(self.transformer, self._hidden(self._tokens_B1, attention)).transpose(0, 1).float()
        self._cache.advance([1] * len(self._samples))
        settings, generators = self.settings, None
        if self._seen_BV is not None:
            logits_B1V = penalize_repetition(logits_B1V, self._seen_BV, settings.repetition_penalty)
        if settings.temperature:
            generators = [
                generator_of(settings.noise_seed, sample.sample_id, self.generated, TOKEN_DRAWS, "hashed")
                for sample in self._samples
            ]
        self._tokens_B1 = choose_tokens(logits_B1V, settings.temperature, generators, settings.top_k, settings.top_p)
        if self._seen_BV is not None:
            self._seen_BV.scatter_(1, self._tokens_B1, True)
        self.generated += 1
        return self._tokens_B1

    def _hidden(self, tokens_BS: torch.Tensor, attention: PackedPrompts | NewBlocks | MaskedBlocks) -> torch.Tensor:
        transformer = self.transformer
        positions = attention.positions if isinstance(attention, PackedPrompts) else attention.positions_SB
        context = transformer.context_at(positions, AttentionMask(), attention)
        return transformer.run_blocks(transformer.embed(tokens_BS), context)


def _in_order(requests: Sequence[Request], settings: AutoregressiveSettings, padding_id: int) -> list[_Sample]:
    """The samples in order of their prompts: neighbours of one length share their attention."""
    samples = [
        _Sample(
            index,
            request.sample_id,
            list(request.token_ids) or [padding_id],
            settings.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens,
        )
        for index, request in enumerate(requests)
    ]
    return sorted(samples, key=lambda sample: len(sample.prompt))
