"""log p(x) of a text under Plaid, estimated from below by its variational bound.

    -log p(x) <= reconstruction + prior + diffusion        (`objectives/plaid.py`)

The prior's term is exact. Each of K draws has a noise for the reconstruction, and a time and a noise for the diffusion
term; the times of a text are (k + u) / K, one of each K-th of [0, 1]. A model with self-conditioning is told its first
estimate at every evaluation: that is a function of z_t, so the bound stays one.

log p(text | context) is estimated as log p(context, text) - log p(context): a difference of two bounds, and no bound.
Both share their draws, position by position.

Shapes: B texts of one length, K draws, R = B * K rows, S positions, L tokens, C channels of an embedding.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from cola_megatron.families.plaid.categorical import embeddings_of
from cola_megatron.families.plaid.denoiser import Denoiser
from cola_megatron.families.plaid.settings import BoundSettings
from cola_megatron.inference.likelihood_terms import Kind, Progress, error_of_even_draws
from cola_megatron.inference.scored_texts import ScoredText, Text, TextBatch, batches
from cola_megatron.objectives.plaid import diffusion_term, noisy_embeddings, prior_kl, squared_distance
from cola_megatron.objectives.randomness import generator


@dataclass(frozen=True)
class Bound:
    """The three terms of -log p(x) <= ..., in nats, float64."""

    reconstruction_K: torch.Tensor
    prior: float
    diffusion_K: torch.Tensor

    @property
    def log_likelihood_K(self) -> torch.Tensor:
        """The bound of log p(x) by each draw."""
        return -(self.reconstruction_K + self.prior + self.diffusion_K)


@dataclass(frozen=True)
class PlaidLikelihood:
    """An estimate of log p(text), from below in expectation; or of log p(text | context), of which it is no bound."""

    figures: ClassVar[Mapping[str, str]] = {
        "reconstruction": "-log p(x|z0), reconstruction",
        "prior": "KL(q(z1|x) || N(0, I)), prior",
        "diffusion": "diffusion term",
        "elbo": "ELBO, less these three",
    }
    joint: Bound
    """Of context and text together."""
    context: Bound | None
    """Of the context alone; None: there is none."""
    tokens: int
    """Of the text without its context; so are the next two."""
    text_bytes: int | None
    """UTF-8; None: token ids without a tokenizer."""
    text_words: int | None
    """Parted by white space."""

    @property
    def log_likelihood_K(self) -> torch.Tensor:
        """The estimate by each draw."""
        return self.joint.log_likelihood_K - (self.context.log_likelihood_K if self.context else 0)

    @property
    def elbo(self) -> float:
        """Mean over the draws, in nats."""
        return float(self.log_likelihood_K.mean())

    @property
    def elbo_error(self) -> float:
        """Standard error of `elbo` over the draws, whose times are spread evenly; NaN for one draw."""
        return error_of_even_draws(self.log_likelihood_K)

    @property
    def reconstruction(self) -> float:
        """Mean of -log p(x | z_0)."""
        return self._difference(lambda bound: float(bound.reconstruction_K.mean()))

    @property
    def prior(self) -> float:
        """KL(q(z_1 | x) || N(0, I))."""
        return self._difference(lambda bound: bound.prior)

    @property
    def diffusion(self) -> float:
        """Mean of the diffusion term."""
        return self._difference(lambda bound: float(bound.diffusion_K.mean()))

    @property
    def kind(self) -> Kind:
        """A bound; with a context an estimate."""
        return "bound" if self.context is None else "estimate"

    @property
    def perplexity(self) -> float:
        """exp(-ELBO / tokens)."""
        return math.exp(-self.elbo / self.tokens)

    @property
    def bits_per_byte(self) -> float | None:
        """-ELBO / (bytes log 2)."""
        return -self.elbo / (self.text_bytes * math.log(2)) if self.text_bytes else None

    def as_json(self) -> dict[str, Any]:
        """The figures and, under `samples`, what they are means of."""
        names = ("elbo", "reconstruction", "prior", "diffusion", "tokens", "text_bytes", "text_words")
        samples = {"log_likelihood": self.log_likelihood_K.tolist()}
        return {**{name: getattr(self, name) for name in names}, "samples": samples}

    def _difference(self, figure: Callable[[Bound], float]) -> float:
        return figure(self.joint) - (figure(self.context) if self.context else 0.0)


def estimate(
    denoiser: Denoiser,
    texts: Sequence[ScoredText],
    settings: BoundSettings,
    batch_size: int,
    progress: Progress | None = None,
) -> list[PlaidLikelihood]:
    """One likelihood per text, in their order. A text that several ask for, such as a context, is computed once.

    Args:
        batch_size: rows (draws of texts) that are computed at once; no result depends on it.
    """
    joint = [Text(text.context_ids + text.token_ids, text.sample_id) for text in texts]
    contexts = [Text(text.context_ids, text.sample_id) if text.context_ids else None for text in texts]
    distinct = list(dict.fromkeys(text for text in [*joint, *contexts] if text is not None))
    device = next(denoiser.plaid.parameters()).device
    at_once = max(1, batch_size // settings.samples)
    bounds: dict[Text, Bound] = {}
    for batch in batches(distinct, 1, at_once, None, device):
        members = [distinct[index] for index in batch.members]
        bounds |= zip(members, _bounds(denoiser, members, batch, settings, batch_size), strict=True)
        if progress is not None:
            progress(len(bounds), len(distinct))
    return [
        PlaidLikelihood(
            bounds[whole],
            bounds[context] if context is not None else None,
            len(text.token_ids),
            text.text_bytes,
            text.text_words,
        )
        for text, whole, context in zip(texts, joint, contexts, strict=True)
    ]


@torch.no_grad()
def _bounds(
    denoiser: Denoiser, texts: Sequence[Text], batch: TextBatch, settings: BoundSettings, batch_size: int
) -> list[Bound]:
    """The bounds of texts of one length."""
    embeddings_VC = denoiser.plaid.embeddings()
    x_SBC = embeddings_of(batch.tokens_BL, embeddings_VC, denoiser.groups)
    levels = denoiser.plaid.schedule(torch.zeros(len(texts), dtype=torch.float64, device=x_SBC.device))
    prior_B = prior_kl(x_SBC, levels.gamma_end_B).sum(0)
    rows = [(row, draw) for row in range(len(texts)) for draw in range(settings.samples)]
    terms: list[torch.Tensor] = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        members = torch.tensor([row for row, _ in part], device=x_SBC.device)
        tokens_RL, x_SRC = batch.tokens_BL[members], x_SBC[:, members]
        times = [_time(texts[row].sample_id, draw, settings) for row, draw in part]
        both = []
        for purpose, time in (("reconstruction", [0.0] * len(part)), ("diffusion", times)):
            noise = [_noise(purpose, texts[row].sample_id, draw, x_SRC, settings) for row, draw in part]
            noise_SRC = torch.from_numpy(np.stack(noise, axis=1)).to(x_SBC.device)
            time_R = torch.tensor(time, dtype=torch.float64, device=x_SBC.device)
            nll_SR, diffusion_SR = _terms(denoiser, tokens_RL, x_SRC, noise_SRC, time_R, embeddings_VC)
            both.append((nll_SR if purpose == "reconstruction" else diffusion_SR).sum(0).double().cpu())
        terms.append(torch.stack(both))
    reconstruction_BK, diffusion_BK = torch.cat(terms, dim=1).unflatten(1, (len(texts), settings.samples))
    return [
        Bound(reconstruction_K, float(prior), diffusion_K)
        for reconstruction_K, prior, diffusion_K in zip(reconstruction_BK, prior_B, diffusion_BK, strict=True)
    ]


def _terms(
    denoiser: Denoiser,
    tokens_RL: torch.Tensor,
    x_SRC: torch.Tensor,
    noise_SRC: torch.Tensor,
    time_R: torch.Tensor,
    embeddings_VC: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-log p(x | z_t) and the diffusion term at each position, (S, R)."""
    gamma_R, slope_R, _, _ = denoiser.plaid.schedule(time_R)
    z_SRC = noisy_embeddings(x_SRC, noise_SRC, gamma_R)
    whole_R, context = torch.ones(len(time_R), device=x_SRC.device), denoiser.context(len(x_SRC), x_SRC.device)
    first_SRC = None
    if denoiser.plaid.input.estimate is not None:
        first_SRC = denoiser.first_estimate(z_SRC, gamma_R, whole_R, embeddings_VC, whole_R.bool(), None)
    hidden_SRH = denoiser.hidden(z_SRC, gamma_R, first_SRC, context)
    found = denoiser.prediction(hidden_SRH, z_SRC, gamma_R, whole_R, embeddings_VC, tokens_RL.t(), whole_R)
    distance_SR = squared_distance(x_SRC, found.estimate_SBC)
    return found.nll_SB.double(), diffusion_term(distance_SR, gamma_R, slope_R)


def _time(sample_id: int, draw: int, settings: BoundSettings) -> float:
    """(k + u) / K, with one u for a text."""
    shift = generator(settings.noise_seed, "likelihood plaid time", sample_id % 2**54, 0).random()
    return (draw + shift) / settings.samples


def _noise(purpose: str, sample_id: int, draw: int, like_SRC: torch.Tensor, settings: BoundSettings) -> np.ndarray:
    """Position by position, so that a text and its beginning share theirs: (S, C)."""
    random = generator(settings.noise_seed, f"likelihood plaid {purpose}", sample_id % 2**54, draw)
    return random.standard_normal((like_SRC.shape[0], like_SRC.shape[2]), np.float32)
