"""log p(x) of a text under the whole model, estimated from below (paper section 4, "Likelihood").

    log w = log p(x|z) + log p_psi(z) - log q(z|x),   z ~ q(z|x)

The prior factorises over blocks and block b sees the clean blocks before it, so all blocks are integrated at once
(`block_flow.py`, `flow_density.py`). Latents are taken in the coordinates of prior and decoder,
y = (z - shifting_factor) * scaling_factor, where log q(y|x) = log q(z|x) - log |scaling_factor| for each coordinate.

A text that does not fill whole blocks is filled with the padding id. The padding's tokens do not count in log p(x|z);
its latents stay in prior and posterior. That is still a bound of log p(x) for the tokens of the text alone: summing
p(x|z) over all other tokens leaves it as it is, and any q will do. The bound loses what the padding's own latents cost.

Shapes: B texts, K samples of the posterior each, R = B * K rows, S latents, C latent channels, N blocks, D coordinates
of a block, L tokens.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from cola_megatron.errors import UserError
from cola_megatron.inference.block_flow import BlockFlow
from cola_megatron.inference.flow_density import flow_log_density, standard_normal_log_density
from cola_megatron.inference.likelihood_terms import Likelihood, Progress, Terms
from cola_megatron.inference.scored_texts import ScoredText, Text, TextBatch, batches, rows_of_logits, token_nll
from cola_megatron.inference.settings import LikelihoodSettings
from cola_megatron.models.dit import DiT
from cola_megatron.models.text_vae import TextVAE
from cola_megatron.objectives.randomness import generator
from cola_megatron.objectives.vae import Posterior, sample_posterior


def estimate(
    vae: TextVAE,
    dit: DiT,
    texts: Sequence[ScoredText],
    settings: LikelihoodSettings,
    padding_id: int | None,
    batch_size: int,
    progress: Progress | None = None,
) -> list[Likelihood]:
    """One likelihood per text, in their order. A text that several ask for, such as a context, is computed once.

    Args:
        padding_id: fills texts up to whole blocks of encoder and prior.
        batch_size: rows (samples of texts) that are integrated at once; no result depends on it.

    Raises:
        ValueError: a text has to be filled up, and there is no `padding_id`. UserError: a deterministic encoder.
    """
    if not vae.config.variational:
        raise UserError("this model's encoder is deterministic: q(z|x) has no density, and the text no such likelihood")
    joint = [Text(text.context_ids + text.token_ids, text.sample_id) for text in texts]
    contexts = [Text(text.context_ids, text.sample_id) if text.context_ids else None for text in texts]
    distinct = list(dict.fromkeys(text for text in [*joint, *contexts] if text is not None))
    unit = vae.config.patch_size * math.lcm(vae.config.block_size, dit.config.block_size)
    size, device = max(1, batch_size // settings.samples), next(dit.parameters()).device
    terms: dict[Text, Terms] = {}
    for batch in batches(distinct, unit, size, padding_id, device):
        members = [distinct[index] for index in batch.members]
        terms |= zip(members, _terms(vae, dit, members, batch, settings, batch_size), strict=True)
        if progress is not None:
            progress(len(terms), len(distinct))
    return [
        Likelihood(
            terms[whole],
            terms[context] if context is not None else None,
            len(text.token_ids),
            text.text_bytes,
            text.text_words,
        )
        for text, whole, context in zip(texts, joint, contexts, strict=True)
    ]


@torch.no_grad()
def _terms(
    vae: TextVAE, dit: DiT, texts: Sequence[Text], batch: TextBatch, settings: LikelihoodSettings, batch_size: int
) -> list[Terms]:
    """The terms of texts of one length; the encoder runs once, everything else once per sample."""
    posterior = vae.encoder(batch.tokens_BL)
    at_once = max(1, batch_size // len(texts))
    parts = [
        _of_draws(vae, dit, texts, batch, posterior, range(first, min(first + at_once, settings.samples)), settings)
        for first in range(0, settings.samples, at_once)
    ]
    reconstruction_BK, prior_BKN, posterior_BK = (torch.cat(part, dim=1).cpu() for part in zip(*parts, strict=True))
    return [Terms(*rows) for rows in zip(reconstruction_BK, prior_BKN, posterior_BK, strict=True)]


def _of_draws(
    vae: TextVAE,
    dit: DiT,
    texts: Sequence[Text],
    batch: TextBatch,
    posterior: Posterior,
    draws: range,
    settings: LikelihoodSettings,
) -> tuple[torch.Tensor, ...]:
    """Some of the samples: reconstruction (B, K), prior (B, K, N) and posterior (B, K)."""
    device, (latents, _, channels) = posterior.mean.device, posterior.mean.shape
    rows = [(text.sample_id, draw) for text in texts for draw in draws]

    def drawn(draw_one: Callable[[str, int, int], np.ndarray], purpose: str) -> torch.Tensor:
        arrays = [draw_one(purpose, sample_id, draw) for sample_id, draw in rows]
        return torch.from_numpy(np.stack(arrays, axis=1)).to(device)

    def normal(purpose: str, sample_id: int, draw: int) -> np.ndarray:
        return stream(settings.noise_seed, purpose, sample_id, draw).standard_normal((latents, channels), np.float32)

    def sign(purpose: str, sample_id: int, draw: int) -> np.ndarray:
        chosen = stream(settings.noise_seed, purpose, sample_id, draw).random((latents, channels)) < 0.5
        return np.where(chosen, np.float32(-1), np.float32(1))

    assert posterior.logvar is not None, "`estimate` refuses an encoder without a density"
    mean_SRC, logvar_SRC = (x.repeat_interleave(len(draws), dim=1) for x in (posterior.mean, posterior.logvar))
    noise_SRC = drawn(normal, "posterior")
    z_SRC = vae.to_prior(sample_posterior(Posterior(mean_SRC, logvar_SRC), noise_SRC))
    posterior_SR = standard_normal_log_density(noise_SRC) - 0.5 * logvar_SRC.double().sum(-1)
    posterior_R = (posterior_SR - channels * math.log(abs(vae.config.scaling_factor))).sum(0)

    flow = BlockFlow(dit, z_SRC)
    probe_RND = None
    if settings.divergence == "hutchinson":
        probe_RND = flow.in_blocks(drawn(sign if settings.probe == "rademacher" else normal, "probe"))
    prior_RN = flow_log_density(flow, flow.in_blocks(z_SRC), settings.solver, settings.steps, probe_RND)

    reconstruction = [
        -token_nll(logits_LV, batch.tokens_BL[row // len(draws)], batch.lengths[row // len(draws)]).sum()
        for row, logits_LV in enumerate(rows_of_logits(vae, z_SRC))
    ]
    by_text = (len(texts), len(draws))
    return tuple(x_R.unflatten(0, by_text) for x_R in (torch.stack(reconstruction), prior_RN, posterior_R))


def stream(seed: int, purpose: str, sample_id: int, draw: int) -> np.random.Generator:
    """The draws of one sample of one text: position by position, so that a text and its beginning share theirs."""
    return generator(seed, f"likelihood {purpose}", sample_id % 2**54, draw)
