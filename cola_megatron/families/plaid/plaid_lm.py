"""A trained Plaid in one process, for notebooks and for the command line."""

from collections.abc import Sequence
from typing import Any

import torch

from cola_megatron.config.plaid import PlaidModelConfig
from cola_megatron.families.plaid.denoiser import Denoiser
from cola_megatron.families.plaid.likelihood import PlaidLikelihood, estimate
from cola_megatron.families.plaid.network import PlaidParts
from cola_megatron.families.plaid.session import PlaidGenerator, PlaidSession
from cola_megatron.families.plaid.settings import BoundSettings, PlaidSettings
from cola_megatron.inference.fast_forward import prepare
from cola_megatron.inference.likelihood_terms import Progress
from cola_megatron.inference.protocol import Request
from cola_megatron.inference.requests import read_settings
from cola_megatron.inference.text_model import TextModel
from cola_megatron.models.transformer import Transformer
from cola_megatron.parallel import load_full_state_dict

TOKENS_AT_ONCE = 2048
"""Whose logits exist at once where a likelihood is estimated."""


class PlaidLM(TextModel):
    """Transformer, embeddings, schedule and tokenizer in evaluation mode.

    Embeddings and schedule stay float32 whatever `dtype` is.
    """

    config: PlaidModelConfig
    settings_class = PlaidSettings

    def build(self, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        """See `TextModel.build`."""
        config, groups = self.config, self.groups
        # Whether the network is told a first estimate is in its weights.
        self_conditioning = "plaid.input.estimate.weight" in weights
        self.transformer = Transformer(config.vocab_size, config.transformer, groups, has_embedding=False)
        self.plaid = PlaidParts(config.vocab_size, config.diffusion, config.transformer, self_conditioning, groups)
        for name, network in (("transformer", self.transformer), ("plaid", self.plaid)):
            own = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
            load_full_state_dict(network, own, groups)
            network.to(self.device).eval().requires_grad_(False)
        self.transformer.to(dtype)
        self.plaid.input.to(dtype)
        prepare(self.transformer, groups)
        self.denoiser = Denoiser(self.transformer, self.plaid, TOKENS_AT_ONCE)
        self._generator = PlaidGenerator(self.transformer, self.plaid)

    def start(self, requests: Sequence[Request], settings: PlaidSettings, padding_id: int) -> PlaidSession:
        """Begins a batch; nothing is padded."""
        return self._generator.start(requests, settings, padding_id)

    def needs_padding(self, request: Request) -> bool:
        """Never: an empty prompt holds nothing."""
        return False

    @torch.no_grad()
    def fixed_outputs(self) -> dict[str, torch.Tensor]:
        """The logits of states that are drawn from a fixed seed, at three noise levels; float32."""
        generator, length = torch.Generator().manual_seed(0), 12
        z_SBC = torch.randn(length, 3, self.config.diffusion.embedding_dim, generator=generator).to(self.device)
        gamma_B = torch.tensor([-2.0, 1.0, 4.0], dtype=torch.float64, device=self.device)
        context = self.denoiser.context(length, self.device)
        hidden_SBH = self.denoiser.hidden(z_SBC, gamma_B, torch.zeros_like(z_SBC), context)
        embeddings_VC = self.plaid.embeddings()
        logits_SBV = self.denoiser.logits(self.denoiser.to_head(hidden_SBH), z_SBC, gamma_B, embeddings_VC)
        levels = self.plaid.schedule(torch.linspace(0, 1, 9, dtype=torch.float64, device=self.device))
        return {"logits": self.denoiser.whole(logits_SBV), "noise levels": levels.gamma_B.float()}

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
    ) -> list[PlaidLikelihood]:
        """Estimates log p(text), or log p(text | context), of each text by the variational bound, in nats.

        log p(text | context) is estimated as log p(context, text) - log p(context), with the same draws in both: a
        difference of two bounds, which is an estimate and no bound. See `likelihood.py`.

        Args:
            texts: texts, or token ids where they are known.
            contexts: what goes before each text; None or an empty one: nothing.
            ids: one integer per text; a text's draws depend on (noise_seed, id, draw) alone. Default 0, 1, ...
            padding_id: not asked; nothing is padded.
            batch_size: rows (draws of texts) that are computed at once. No result depends on it.
            progress: told (texts done, texts in all), where contexts count as texts of their own.
            options: any fields of `settings.BoundSettings`.

        Raises:
            ValueError: a text without tokens; settings, ids or token ids out of range; numbers that do not match; texts
                without a tokenizer.
        """
        settings = read_settings(BoundSettings, options, "a likelihood")
        return estimate(
            self.denoiser, self._read_texts(texts, contexts, ids, batch_size), settings, batch_size, progress
        )
