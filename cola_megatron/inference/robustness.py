"""How well the decoder reads latents that are not clean: reconstruction over the flow time t.

    z_t = (1 - t) z0 + t z1,   z0 the posterior mean in the prior's coordinates,   z1 ~ N(0, I)

A prior's sample lies some way off the posterior's, so what the decoder makes of z_t says how exact a prior must be.

Shapes: B batch, S latents, C latent channels, L tokens, T times, M texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cola_megatron.inference.likelihood import stream
from cola_megatron.inference.likelihood_terms import Progress
from cola_megatron.inference.scored_texts import Text, batches, rows_of_logits, token_nll
from cola_megatron.models.text_vae import TextVAE


@dataclass(frozen=True)
class RobustnessCurve:
    """Sums of each text at each time, float64 on the CPU."""

    times: list[float]
    tokens_M: torch.Tensor
    """Tokens of each text; padding does not count."""
    correct_MT: torch.Tensor
    """Tokens that the decoder's most likely one is."""
    nll_MT: torch.Tensor
    """-log p(x|z_t), in nats."""

    @property
    def accuracy(self) -> list[float]:
        """Share of tokens at each time."""
        return (self.correct_MT.sum(0) / self.tokens_M.sum()).tolist()

    @property
    def cross_entropy(self) -> list[float]:
        """Nats per token at each time."""
        return (self.nll_MT.sum(0) / self.tokens_M.sum()).tolist()

    def as_json(self) -> dict[str, Any]:
        """Times with their accuracy and cross entropy."""
        figures = zip(self.times, self.accuracy, self.cross_entropy, strict=True)
        return {
            "texts": len(self.tokens_M),
            "tokens": int(self.tokens_M.sum()),
            "curve": [{"t": time, "accuracy": share, "cross_entropy": nats} for time, share, nats in figures],
        }


@torch.no_grad()
def reconstruction_curve(
    vae: TextVAE,
    texts: Sequence[Text],
    times: Sequence[float],
    noise_seed: int,
    padding_id: int | None,
    batch_size: int,
    progress: Progress | None = None,
) -> RobustnessCurve:
    """Accuracy and cross entropy of decoding z_t; a text has one z1, the same at all times.

    Args:
        padding_id: fills texts up to whole blocks of the encoder.
        batch_size: texts that are decoded at once; no result depends on it.

    Raises:
        ValueError: a time outside 0 .. 1; a text has to be filled up, and there is no `padding_id`.
    """
    for time in times:
        if not 0 <= time <= 1:
            raise ValueError(f"t={time} must lie in 0 .. 1")
    device, unit = next(vae.parameters()).device, vae.config.patch_size * vae.config.block_size
    tokens_M = torch.tensor([len(text.token_ids) for text in texts], dtype=torch.float64)
    correct_MT, nll_MT = torch.zeros(2, len(texts), len(times), dtype=torch.float64)
    done = 0
    for batch in batches(texts, unit, batch_size, padding_id, device):
        z0_SBC = vae.to_prior(vae.encoder(batch.tokens_BL).mean)
        shape = (z0_SBC.shape[0], z0_SBC.shape[2])
        noise = [
            stream(noise_seed, "robustness", texts[index].sample_id, 0).standard_normal(shape, np.float32)
            for index in batch.members
        ]
        z1_SBC = torch.from_numpy(np.stack(noise, axis=1)).to(device)
        for column, time in enumerate(times):
            for row, logits_LV in enumerate(rows_of_logits(vae, (1 - time) * z0_SBC + time * z1_SBC)):
                member, tokens_L, length = batch.members[row], batch.tokens_BL[row], batch.lengths[row]
                correct_MT[member, column] = (logits_LV.argmax(-1) == tokens_L)[:length].sum()
                nll_MT[member, column] = token_nll(logits_LV, tokens_L, length).sum()
        done += len(batch.members)
        if progress is not None:
            progress(done, len(texts))
    return RobustnessCurve(list(times), tokens_M, correct_MT, nll_MT)
