"""From logits to ids: penalty, truncation, draws."""

import pytest
import torch

from cola_megatron.inference.noise import block_noise, generator_of, share_noise
from cola_megatron.inference.sampling import choose_tokens, keep_top_k, keep_top_p, penalize_repetition

PROBABILITIES = torch.tensor([0.1, 0.4, 0.15, 0.3, 0.05])
LOGITS = PROBABILITIES.log()[None, None]


def kept(logits: torch.Tensor) -> list[int]:
    return logits[0, 0].isfinite().nonzero()[:, 0].tolist()


def draws(count: int, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return choose_tokens(LOGITS.expand(1, count, -1), 1.0, [generator], **options)[0]


def test_top_k_keeps_the_largest_and_ties_with_the_last_of_them():
    assert kept(keep_top_k(LOGITS, 2)) == [1, 3]
    assert kept(keep_top_k(LOGITS, 0)) == kept(keep_top_k(LOGITS, 9)) == [0, 1, 2, 3, 4]
    assert kept(keep_top_k(torch.tensor([[[1.0, 2.0, 1.0, 0.0]]]), 2)) == [0, 1, 2]


def test_top_p_keeps_the_fewest_that_reach_it():
    assert kept(keep_top_p(LOGITS, 0.3)) == [1]
    assert kept(keep_top_p(LOGITS, 0.45)) == [1, 3]
    assert kept(keep_top_p(LOGITS, 0.8)) == [1, 2, 3]
    assert kept(keep_top_p(LOGITS, 1.0)) == [0, 1, 2, 3, 4]
    assert kept(keep_top_p(LOGITS, 1e-9)) == [1]


def test_draws_have_the_probabilities_of_what_is_left():
    frequencies = torch.bincount(draws(40_000), minlength=5) / 40_000
    torch.testing.assert_close(frequencies, PROBABILITIES, rtol=0, atol=0.01)
    frequencies = torch.bincount(draws(40_000, top_k=3, top_p=0.8), minlength=5) / 40_000
    # Of 0.4, 0.3, 0.15 top p = 0.8 of their sum keeps the first two.
    torch.testing.assert_close(frequencies, torch.tensor([0, 4 / 7, 0, 3 / 7, 0]), rtol=0, atol=0.01)


def test_greedy_asks_neither_generators_nor_truncation():
    assert choose_tokens(LOGITS, 0.0, None, top_k=1, top_p=0.1).tolist() == [[1]]


def test_the_penalty_moves_seen_ids_down_whatever_their_sign():
    logits = torch.tensor([[[2.0, -2.0, 1.0]]])
    seen = torch.tensor([[True, True, False]])
    assert penalize_repetition(logits, seen, 2.0).tolist() == [[[1.0, -4.0, 1.0]]]
    assert penalize_repetition(logits, seen, 1.0) is logits


# ---- noise ----------------------------------------------------------------------------------------------------------


def test_by_the_published_formula_ids_ten_thousand_apart_share_noise_and_by_the_hashed_one_none_do():
    def equal(formula: str) -> bool:
        one, other = block_noise(66, 10_000, 0, (4, 8), formula), block_noise(66, 0, 1, (4, 8), formula)
        return torch.equal(one, other)

    assert equal("published") and not equal("hashed")
    assert share_noise([3, 10_003]) and share_noise(range(10_001)) and not share_noise(range(10_000))


@pytest.mark.parametrize("seed", [-(2**62), 66, 2**62])
def test_the_hashed_formula_gives_every_sample_block_and_draw_a_stream_of_its_own(seed):
    places = [(sample, block, draws) for sample in (-1, 0, 1, 10_000, 2**52) for block in range(3) for draws in (0, 5)]
    seeds = {generator_of(seed, *place, formula="hashed").initial_seed() for place in places}
    assert len(seeds) == len(places)
    again = block_noise(seed, 7, 2, (4, 8), "hashed")
    assert torch.equal(again, block_noise(seed, 7, 2, (4, 8), "hashed")) and abs(again.mean()) < 1
