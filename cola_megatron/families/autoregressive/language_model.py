"""`AutoregressiveLM`: a trained autoregressive model in one process, for notebooks and for the command line.

Shapes: L tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch

from cola_megatron.config.autoregressive import AutoregressiveModelConfig
from cola_megatron.families.autoregressive.likelihood import (
    ExactLikelihood,
    exact_likelihoods,
)
from cola_megatron.families.autoregressive.session import (
    AutoregressiveGenerator,
    AutoregressiveSession,
)
from cola_megatron.families.autoregressive.settings import AutoregressiveSettings, ExactLikelihoodSettings
from cola_megatron.inference.likelihood_terms import Progress
from cola_megatron.inference.protocol import Request
from cola_megatron.inference.requests import read_settings, read_token_ids
from cola_megatron.inference.text_model import TextModel
from cola_megatron.layers.masks import AttentionMask
from cola_megatron.models.transformer import Transformer
from cola_megatron.models.transformer_steps import whole_logits
from cola_megatron.parallel import load_full_state_dict

NETWORK = "transformer."
"""What the names of its tensors begin with in a checkpoint."""


class AutoregressiveLM(TextModel):
    """Transformer and tokenizer in evaluation mode. It is an `inference.protocol.Generator`."""

    config: AutoregressiveModelConfig
    settings_class = AutoregressiveSettings

    def build(self, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        """See `TextModel.build`."""
        config, groups = self.config, self.groups
        self.transformer = Transformer(config.vocab_size, config.transformer, groups)
        own = {name.removeprefix(NETWORK): tensor for name, tensor in weights.items()}
        load_full_state_dict(self.transformer, own, groups)
        self.transformer.to(self.device, dtype).eval().requires_grad_(False)
        self._generator = AutoregressiveGenerator(self.transformer)

    def start(
        self, requests: Sequence[Request], settings: AutoregressiveSettings, padding_id: int
    ) -> AutoregressiveSession:
        """Reads the prompts into the cache."""
        return self._generator.start(requests, settings, padding_id)

    def _padding_id(self) -> int:
        """What a text begins from: the token that ends documents, for after `<|pad|>` nothing was ever predicted."""
        return self.end_of_text_ids[0] if self.end_of_text_ids else super()._padding_id()

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Of the token behind each of these: ids (L,) -> (L, V), float32.

        Raises:
            ValueError: no ids, or one that is out of range.
        """
        token_ids = read_token_ids("ids", ids, self._encode_text, self.vocab_size)
        if not token_ids:
            raise ValueError("ids must hold at least one token id")
        tokens_1L, transformer = torch.tensor([token_ids], device=self.device), self.transformer
        context = transformer.context(len(token_ids), self.device, AttentionMask(causal=True))
        return whole_logits(transformer, transformer.run_blocks(transformer.embed(tokens_1L), context))[:, 0].float()

    def log_likelihood(
        self,
        texts: Sequence[str | Sequence[int]],
        contexts: Sequence[str | Sequence[int]] | None = None,
        ids: Sequence[int] | None = None,
        *,
        padding_id: int | None = None,
        batch_size: int = 16,
        progress: Progress | None = None,
        **options: Any,
    ) -> list[ExactLikelihood]:
        """log p(text), or log p(text | context), of each text, in nats: exact; see `likelihood.py`.

        Args:
            texts: texts, or token ids where they are known.
            contexts: what goes before each text; None or an empty one: nothing.
            ids: one integer per text; nothing is drawn, so nothing depends on them.
            padding_id: stands before a text without a context; by default the token that ends documents.
            batch_size: texts that are computed at once. No result depends on it.
            progress: told (texts done, texts in all).
            options: there are none.

        Raises:
            ValueError: an option; a text without tokens; ids or token ids out of range; numbers that do not match;
                texts without a tokenizer; a text without a context, and no padding id.
        """
        read_settings(ExactLikelihoodSettings, options, "a likelihood that is exact")
        scored = self._read_texts(texts, contexts, ids, batch_size)
        return exact_likelihoods(self.transformer, scored, self._padding_of_texts(padding_id), batch_size, progress)

    def fixed_outputs(self) -> dict[str, torch.Tensor]:
        """Of `logits`."""
        ids = torch.randint(0, self.vocab_size, (48,), generator=torch.Generator().manual_seed(0))
        return {"logits": self.logits(ids.tolist())}
