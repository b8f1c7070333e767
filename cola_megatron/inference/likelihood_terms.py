"""What an estimate of log p(x) consists of, and the figures that follow from it. All in nats, float64.

    log w_k = log p(x|z_k) + log p_psi(z_k) - log q(z_k|x),   z_k ~ q(z|x),   k = 1 .. K
    ELBO = mean_k log w_k,   IWAE = log mean_k w_k

Shapes: K samples of the posterior, N blocks.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch

Progress = Callable[[int, int], None]
"""(how many texts are done, how many there are)."""


Kind = Literal["exact", "bound", "estimate"]
"""What an `elbo` is: log p itself, a lower bound of it in expectation, or neither."""


def error_of_even_draws(values_K: torch.Tensor) -> float:
    """Standard error of the mean of draws that are spread evenly over times or levels, in their order; NaN for one.

    From the differences of neighbours, sum (x_k+1 - x_k)^2 / (2 K (K - 1)): what changes along the times is no chance.
    Estimator v2 of a systematic sample in K. Wolter, Introduction to Variance Estimation, chapter 8.
    """
    draws = len(values_K)
    if draws == 1:
        return math.nan
    return math.sqrt(float(values_K.diff().square().sum()) / (2 * draws * (draws - 1)))


@dataclass(frozen=True)
class Terms:
    """The three terms of one text."""

    reconstruction_K: torch.Tensor
    """log p(x|z), over the tokens of the text; those of padding do not count."""
    prior_KN: torch.Tensor
    """log p_psi(z^(b) | z^(<b)) of every block."""
    posterior_K: torch.Tensor
    """log q(z|x), in the prior's coordinates."""

    @property
    def log_weights_K(self) -> torch.Tensor:
        """log w."""
        return self.reconstruction_K + self.prior_KN.sum(-1) - self.posterior_K

    @property
    def iwae(self) -> float:
        """log mean_k w_k."""
        return float(self.log_weights_K.logsumexp(0)) - math.log(len(self.log_weights_K))


class TextLikelihood(Protocol):
    """What is known of log p(text), or of log p(text | context), by a model of any family."""

    figures: ClassVar[Mapping[str, str]]
    """Its figures in nats by name, `elbo` among them, and each in words; for tables."""

    @property
    def tokens(self) -> int:
        """Of the text without its context; so are the next two."""

    @property
    def text_bytes(self) -> int | None:
        """UTF-8; None: token ids without a tokenizer."""

    @property
    def text_words(self) -> int | None:
        """Parted by white space."""

    @property
    def elbo(self) -> float:
        """log p, a bound of it or an estimate, whatever the family has."""

    @property
    def elbo_error(self) -> float:
        """Standard error of `elbo` over the draws for this text; 0 where nothing is drawn, NaN for a single draw."""

    @property
    def kind(self) -> Kind:
        """What `elbo` is."""

    def as_json(self) -> dict[str, Any]:
        """Everything that is known."""


@dataclass(frozen=True)
class Likelihood:
    """An estimate of log p(text), or of log p(text | context) = log p(context, text) - log p(context).

    Without a context `elbo` is a lower bound of log p(text) in expectation, and so is `iwae` where the divergence is
    exact: the noise of Hutchinson's probes leaves the mean of log w where it is, but raises that of w. With a context
    both are differences of two bounds: estimates, and no bounds. Context and joint text share their draws, so that
    what they have in common cancels.
    """

    figures: ClassVar[Mapping[str, str]] = {
        "reconstruction": "log p(x|z), reconstruction",
        "prior": "log p(z), prior",
        "posterior": "log q(z|x), posterior",
        "elbo": "ELBO",
        "iwae": "IWAE",
    }
    joint: Terms
    """Of context and text together."""
    context: Terms | None
    """Of the context alone; None: there is none."""
    tokens: int
    """Of the text without its context; so are the next two."""
    text_bytes: int | None
    """UTF-8; None: token ids without a tokenizer."""
    text_words: int | None
    """Parted by white space."""

    @property
    def reconstruction_K(self) -> torch.Tensor:
        """log p(x|z) of each sample."""
        return self.joint.reconstruction_K - (self.context.reconstruction_K if self.context else 0)

    @property
    def prior_K(self) -> torch.Tensor:
        """log p_psi(z) of each sample."""
        return self.joint.prior_KN.sum(-1) - (self.context.prior_KN.sum(-1) if self.context else 0)

    @property
    def posterior_K(self) -> torch.Tensor:
        """log q(z|x) of each sample."""
        return self.joint.posterior_K - (self.context.posterior_K if self.context else 0)

    @property
    def log_weights_K(self) -> torch.Tensor:
        """log w of each sample."""
        return self.reconstruction_K + self.prior_K - self.posterior_K

    @property
    def reconstruction(self) -> float:
        """Mean of log p(x|z)."""
        return float(self.reconstruction_K.mean())

    @property
    def prior(self) -> float:
        """Mean of log p_psi(z)."""
        return float(self.prior_K.mean())

    @property
    def posterior(self) -> float:
        """Mean of log q(z|x)."""
        return float(self.posterior_K.mean())

    @property
    def elbo(self) -> float:
        """reconstruction + prior - posterior."""
        return float(self.log_weights_K.mean())

    @property
    def kind(self) -> Kind:
        """A bound up to the solver's error; with a context an estimate."""
        return "bound" if self.context is None else "estimate"

    @property
    def iwae(self) -> float:
        """log mean_k w_k, less that of the context."""
        return self.joint.iwae - (self.context.iwae if self.context else 0.0)

    @property
    def elbo_error(self) -> float:
        """Standard error of `elbo` over the samples; NaN for one sample."""
        draws = len(self.log_weights_K)
        return float(self.log_weights_K.std()) / math.sqrt(draws) if draws > 1 else math.nan

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
        samples = {
            name: getattr(self, f"{name}_K").tolist()
            for name in ("log_weights", "reconstruction", "prior", "posterior")
        }
        names = ("elbo", "iwae", "reconstruction", "prior", "posterior", "tokens", "text_bytes", "text_words")
        return {**{name: getattr(self, name) for name in names}, "samples": samples}
