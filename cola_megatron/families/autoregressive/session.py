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
    """One running sample; the batch is a list of these, in order of their length."""

    index: int
    """Of its request."""
    sample_id: int
    prompt: list[int]
    left: int
    """Tokens that are still to come."""
    generated: int = 0


class AutoregressiveSession:
    """A batch under way (`inference.protocol.Session`). Nothing is generated in between, so there are no previews."""

    def __init__(
        self, transformer: Transformer, requests: Sequence[Request], settings: AutoregressiveSettings, padding_id: int
    ):
        self.transformer, self.settings, self.padding_id = transformer, settings, padding_id
        self.device = next(transformer.parameters()).device
        self._requests = 0
        self._samples: list[_Sample] = []
        self._cache = KeyValueCache()
        self._tokens_B1 = torch.zeros(0, 1, dtype=torch.long, device=self.device)
        self._seen_BV: torch.Tensor | None = None
        if settings.repetition_penalty != 1.0:
            self._seen_BV = torch.zeros(0, transformer.vocab_size, dtype=torch.bool, device=self.device)
        self.admit(requests)

    @property
    def running(self) -> list[int]:
        """Samples that are not finished, as indices of their requests."""
        return sorted(sample.index for sample in self._samples)

    @torch.no_grad()
    def admit(self, requests: Sequence[Request]) -> None:
        """Further samples, which begin with the next token: reads their prompts into the cache."""
        if not requests:
            return
        new = []
        for request in requests:
            left = self.settings.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
            prompt = list(request.token_ids) or [self.padding_id]
            new.append(_Sample(self._requests, request.sample_id, prompt, left))
            self._requests += 1
        # The last token of a prompt is the first that is read by a step; those before it are read here.
        before = len(self._samples)
        self._cache.add(len(new), max(len(sample.prompt) - 1 + sample.left for sample in new))
        self._samples += new
        self._read(before)
        last_B1 = torch.tensor([sample.prompt[-1:] for sample in new], device=self.device)
        self._tokens_B1 = torch.cat((self._tokens_B1, last_B1))
        if self._seen_BV is not None:
            self._seen_BV = torch.cat((self._seen_BV, self._seen_BV.new_zeros(len(new), self.transformer.vocab_size)))
        # Neighbours of one length share their attention.
        lengths = self._cache.lengths
        rows = sorted(range(len(lengths)), key=lengths.__getitem__)
        if rows != list(range(len(lengths))):
            self._cache.arrange(rows)
            self._take(rows)

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
        self._cache.keep(rows)
        self._take(rows)

    def _take(self, rows: Sequence[int]) -> None:
        self._samples = [self._samples[row] for row in rows]
        rows_B = torch.tensor(rows, dtype=torch.long, device=self.device)
        self._tokens_B1 = self._tokens_B1[rows_B]
        if self._seen_BV is not None:
            self._seen_BV = self._seen_BV[rows_B]

    def _read(self, before: int) -> None:
        """Fills the cache with the prompts of the samples from row `before` on; no logits are needed of them."""
        prompts = [sample.prompt[:-1] for sample in self._samples[before:]]
        for pack in packs([len(prompt) for prompt in prompts]):
            lengths, rows = [len(prompts[member]) for member in pack], [before + member for member in pack]
            attention = PackedPrompts(lengths, 1, self.device, self._cache, rows)
            tokens_1N = torch.tensor([[token for member in pack for token in prompts[member]]], device=self.device)
            self._hidden(tokens_1N, attention)
        self._cache.advance([0] * before + [len(prompt) for prompt in prompts])

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
                generator_of(settings.noise_seed, sample.sample_id, sample.generated, TOKEN_DRAWS, "hashed")
                for sample in self._samples
            ]
        self._tokens_B1 = choose_tokens(logits_B1V, settings.temperature, generators, settings.top_k, settings.top_p)
        if self._seen_BV is not None:
            self._seen_BV.scatter_(1, self._tokens_B1, True)
        for sample in self._samples:
            sample.generated += 1
        return self._tokens_B1

    def _hidden(self, tokens_BS: torch.Tensor, attention: PackedPrompts | NewBlocks | MaskedBlocks) -> torch.Tensor:
        transformer = self.transformer
        positions = attention.positions if isinstance(attention, PackedPrompts) else attention.positions_SB
        context = transformer.context_at(positions, AttentionMask(), attention)
        return transformer.run_blocks(transformer.embed(tokens_BS), context)
