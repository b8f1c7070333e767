"""`MaskedDiffusionLM`: a trained masked-diffusion model in one process, for notebooks and for the command line.

Shapes: L tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch

from cola_megatron.config.masked_diffusion import MaskedDiffusionModelConfig
from cola_megatron.families.masked_diffusion.copies import Copies
from cola_megatron.families.masked_diffusion.likelihood import (
    BoundedLikelihood,
    BoundSettings,
    TransformerDenoiser,
    estimate,
)
from cola_megatron.families.masked_diffusion.session import MaskedDiffusionGenerator, MaskedDiffusionSession
from cola_megatron.families.masked_diffusion.settings import MaskedDiffusionSettings
from cola_megatron.inference.likelihood_terms import Progress
from cola_megatron.inference.protocol import Request
from cola_megatron.inference.requests import integers, read_settings
from cola_megatron.inference.text_model import TextModel
from cola_megatron.models.transformer import Transformer
from cola_megatron.models.transformer_steps import whole_logits
from cola_megatron.parallel import load_full_state_dict

NETWORK = "transformer."
"""What the names of its tensors begin with in a checkpoint."""


class MaskedDiffusionLM(TextModel):
    """Transformer and tokenizer in evaluation mode. It is an `inference.protocol.Generator`."""

    config: MaskedDiffusionModelConfig
    settings_class = MaskedDiffusionSettings

    def build(self, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        """See `TextModel.build`."""
        config, groups = self.config, self.groups
        self.transformer = Transformer(config.vocab_size, config.transformer, groups, extra_rows=config.extra_rows)
        own = {name.removeprefix(NETWORK): tensor for name, tensor in weights.items()}
        load_full_state_dict(self.transformer, own, groups)
        self.transformer.to(self.device, dtype).eval().requires_grad_(False)
        self._generator = MaskedDiffusionGenerator(self.transformer, config)

    def start(
        self, requests: Sequence[Request], settings: MaskedDiffusionSettings, padding_id: int
    ) -> MaskedDiffusionSession:
        """Begins with all new tokens masked."""
        return self._generator.start(requests, settings, padding_id)

    def needs_padding(self, request: Request) -> bool:
        """Never: masked tokens fill an empty prompt, and a block that a prompt does not fill."""
        return False

    @torch.no_grad()
    def logits(self, ids: Sequence[int], clean: Sequence[int] | None = None) -> torch.Tensor:
        """Of every position: ids (L,) -> (L, V), float32. [MASK] is the id `config.mask_id`.

        Args:
            clean: the ids without [MASK], for a model that was trained by blocks: each block sees its own `ids` and the
                `clean` ones of those before it; by default they are the same. L is then whole blocks.

        Raises:
            ValueError: no ids, one that is out of range, lengths that differ or are no whole blocks.
        """
        noisy, known = integers("ids", ids), integers("clean", ids if clean is None else clean)
        rows, size = self.config.vocab_size + self.config.extra_rows, self.config.block_size or len(noisy)
        if not noisy or len(known) != len(noisy) or len(noisy) % size:
            raise ValueError(f"{len(noisy)} ids and {len(known)} clean ones must be as many, in whole blocks of {size}")
        for token in (*noisy, *known):
            if not 0 <= token < rows:
                raise ValueError(f"ids: token id {token} must lie in 0 .. {rows - 1}")
        copies, transformer = Copies(len(noisy), size), self.transformer
        tokens_1S = copies.tokens(*(torch.tensor([each], device=self.device) for each in (known, noisy)))
        hidden_S1H = transformer.run_blocks(transformer.embed(tokens_1S), copies.context(transformer, self.device))
        return whole_logits(transformer, hidden_S1H[copies.clean_length :])[:, 0].float()

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
    ) -> list[BoundedLikelihood]:
        """A lower bound of log p(text), or of log p(text | context), of each text, in nats; see `likelihood.py`.

        Args:
            texts: texts, or token ids where they are known.
            contexts: what goes before each text; None or an empty one: nothing.
            ids: one integer per text; a text's draws depend on (noise_seed, id, draw) alone. Default 0, 1, ...
            padding_id: not needed: what a text leaves of its last block stays masked.
            batch_size: draws of a text that are computed at once. No result depends on it.
            progress: told (texts done, texts in all).
            options: any fields of `likelihood.BoundSettings`.

        Raises:
            ValueError: a text without tokens; settings, ids or token ids out of range; numbers that do not match; texts
                without a tokenizer; a text that holds [MASK].
        """
        settings = read_settings(BoundSettings, options, "a likelihood")
        scored = self._read_texts(texts, contexts, ids, batch_size)
        denoiser = TransformerDenoiser(self.transformer, self.config.block_size, self.config.mask_id)
        return estimate(denoiser, scored, settings, batch_size, progress)

    def fixed_outputs(self) -> dict[str, torch.Tensor]:
        """Of `logits`, with every third token masked."""
        length = 48 if self.config.block_size is None else 3 * self.config.block_size
        ids = torch.randint(0, self.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
        masked = torch.arange(length) % 3 == 0
        noisy = torch.where(masked, self.config.mask_id, ids)
        return {"logits": self.logits(noisy.tolist(), ids.tolist())}
