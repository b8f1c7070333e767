"""From logits to ids: penalty, truncation, draws."""

import torch

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
