"""The bound of masked diffusion where everything is known: a Markov chain, and its exact conditionals as the network.

Shapes: L tokens, V states, R rows.
"""

import itertools
import math

import pytest
import torch

from cola_megatron.families.masked_diffusion.likelihood import BoundSettings, estimate
from cola_megatron.inference.scored_texts import ScoredText

STATES, LENGTH = 3, 5
START_V = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
STEP_VV = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]], dtype=torch.float64)
MASK = STATES
TEXTS = list(itertools.product(range(STATES), repeat=LENGTH))


def log_probability(text: tuple[int, ...]) -> float:
    steps = [STEP_VV[a, b] for a, b in itertools.pairwise(text)]
    return math.log(START_V[text[0]]) + sum(math.log(step) for step in steps)


PROBABILITIES = torch.tensor([log_probability(text) for text in TEXTS], dtype=torch.float64).exp()
ENTROPY = -float(PROBABILITIES @ PROBABILITIES.log())


class ExactDenoiser:
    """p(x_i | visible tokens), by enumeration of all texts; `temperature` above 1 makes it worse than that."""

    def __init__(self, block_size: int | None = None, temperature: float = 1.0):
        self.block_size, self.mask_id, self.temperature = block_size, MASK, temperature
        self.masked: list[int] = []
        """How many tokens each row that was asked about had masked."""
        self.texts_ZL, self.known = torch.tensor(TEXTS), {}

    def nll(self, clean_RL: torch.Tensor, noisy_RL: torch.Tensor) -> torch.Tensor:
        self.masked += (noisy_RL == MASK).sum(1).tolist()
        rows = zip(clean_RL.tolist(), noisy_RL.tolist(), strict=True)
        return torch.stack([self._row(clean, noisy) for clean, noisy in rows])

    def _row(self, clean: list[int], noisy: list[int]) -> torch.Tensor:
        size, found = self.block_size or len(clean), []
        for place, token in enumerate(clean):
            first = place // size * size
            seen = clean[:first] + noisy[first : first + size]
            is_asked = noisy[place] == MASK and token != MASK
            found.append(-math.log(self.given(tuple(seen), place)[token]) if is_asked else 0.0)
        return torch.tensor(found, dtype=torch.float64)

    def given(self, seen: tuple[int, ...], place: int) -> list[float]:
        if (seen, place) not in self.known:
            self.known[seen, place] = self._enumerate(seen, place)
        return self.known[seen, place]

    def _enumerate(self, seen: tuple[int, ...], place: int) -> list[float]:
        fits_Z = torch.ones(len(TEXTS), dtype=torch.bool)
        for position, known in enumerate(seen):
            if known != MASK:
                fits_Z &= self.texts_ZL[:, position] == known
        of_states_V = torch.stack(
            [PROBABILITIES[fits_Z & (self.texts_ZL[:, place] == state)].sum() for state in range(STATES)]
        )
        of_states_V = of_states_V.pow(1 / self.temperature)
        return (of_states_V / of_states_V.sum()).tolist()


def asked(text: tuple[int, ...], context: int = 0, sample_id: int = 0) -> ScoredText:
    return ScoredText(text[:context], text[context:], sample_id, None, None)


def expected_bound(denoiser: ExactDenoiser, draws: int) -> tuple[float, float]:
    """-ELBO in the mean over all texts of the chain, and its Monte-Carlo error."""
    found = estimate(denoiser, [asked(text, sample_id=index) for index, text in enumerate(TEXTS)], settings(draws), 64)
    variances = torch.tensor([each.elbo_error**2 for each in found], dtype=torch.float64)
    bounds = torch.tensor([-each.elbo for each in found], dtype=torch.float64)
    return float(PROBABILITIES @ bounds), math.sqrt(float(PROBABILITIES.square() @ variances))


def settings(samples: int, **more: int) -> BoundSettings:
    return BoundSettings(samples=samples, **more)


@pytest.mark.parametrize("block_size", [None, 2])
def test_the_exact_denoiser_s_bound_is_the_entropy(block_size):
    """Any order of unmasking factorises the same distribution, so nothing is lost but the Monte-Carlo error."""
    bound, error = expected_bound(ExactDenoiser(block_size), draws=60)
    assert error < 0.02 * ENTROPY
    assert bound == pytest.approx(ENTROPY, abs=4 * error)


@pytest.mark.parametrize("block_size", [None, 2, 1])
def test_an_imperfect_denoiser_s_bound_lies_above_the_entropy(block_size):
    bound, error = expected_bound(ExactDenoiser(block_size, temperature=1.7), draws=60)
    assert bound - 4 * error > ENTROPY


@pytest.mark.parametrize("context", [0, 2])
def test_blocks_of_one_token_are_the_autoregressive_factorisation(context):
    """Exactly, text by text, in one draw."""
    denoiser = ExactDenoiser(block_size=1, temperature=1.3)
    for index in (0, 17, 100, 242):
        text = TEXTS[index]
        seen = [(*text[:place], *[MASK] * (LENGTH - place)) for place in range(LENGTH)]
        factors = [math.log(denoiser.given(seen[place], place)[text[place]]) for place in range(context, LENGTH)]
        denoiser.masked = []
        (found,) = estimate(denoiser, [asked(text, context)], settings(128), 64)
        assert found.elbo == pytest.approx(sum(factors), rel=1e-12)
        assert denoiser.masked == [LENGTH - context]
        assert (found.elbo_error, found.tokens) == (0.0, LENGTH - context)


@pytest.mark.parametrize("block_size", [None, 2, 3])
@pytest.mark.parametrize("context", [1, 3])
def test_a_bound_given_a_context_is_that_of_the_conditional(block_size, context):
    """A block that holds context and text masks the text alone; a block that the text does not fill stays masked."""
    text = TEXTS[100]
    prefixes = [value for value, other in zip(PROBABILITIES, TEXTS, strict=True) if other[:context] == text[:context]]
    exact = log_probability(text) - math.log(sum(prefixes))
    (found,) = estimate(ExactDenoiser(block_size), [asked(text, context)], settings(600), 256)
    assert found.elbo == pytest.approx(exact, abs=4 * found.elbo_error + 1e-12)


@pytest.mark.parametrize("sample_id", range(4))
def test_draws_are_spread_evenly_over_the_numbers_of_masked_tokens(sample_id):
    denoiser = ExactDenoiser()
    estimate(denoiser, [asked(TEXTS[77], sample_id=sample_id)], settings(2 * LENGTH), 3)
    assert sorted(denoiser.masked) == sorted([*range(1, LENGTH + 1)] * 2)


def test_a_bound_depends_on_its_text_its_id_and_the_seed_alone():
    texts = [asked(TEXTS[5], 1, 3), asked(TEXTS[60], 0, 4), asked(TEXTS[60], 0, 5)]
    together = estimate(ExactDenoiser(), texts, settings(12), 5)
    for text, found in zip(texts, together, strict=True):
        (alone,) = estimate(ExactDenoiser(), [text], settings(12), 12)
        assert torch.equal(alone.bound_K, found.bound_K)
    assert not torch.equal(together[1].bound_K, together[2].bound_K)
    (other,) = estimate(ExactDenoiser(), texts[:1], settings(12, noise_seed=1), 5)
    assert not torch.equal(other.bound_K, together[0].bound_K)


def test_what_is_reported():
    found = estimate(ExactDenoiser(), [ScoredText((0,), (1, 2), 0, 7, 2)], settings(4), 2)[0]
    assert found.perplexity == pytest.approx(math.exp(-found.elbo / 2))
    assert found.bits_per_byte == pytest.approx(-found.elbo / 7 / math.log(2))
    told = found.as_json()
    assert told["elbo"] == found.elbo and told["samples"]["bound"] == found.bound_K.tolist()
    assert (told["tokens"], told["text_bytes"], told["text_words"]) == (2, 7, 2)


def test_a_text_that_holds_mask_is_refused():
    with pytest.raises(ValueError, match=r"token id 3, which is \[MASK\]"):
        estimate(ExactDenoiser(), [asked((0, MASK, 1))], settings(2), 2)
    with pytest.raises(ValueError, match=r"token id 3, which is \[MASK\]"):
        estimate(ExactDenoiser(), [asked((MASK, 0, 1), context=1)], settings(2), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"samples": 0}, "samples=0 must"), ({"samples": 1.5}, "samples=1.5 must"), ({"noise_seed": 2**63}, "noise_seed")],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BoundSettings(**options)
