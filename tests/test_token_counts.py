"""Counts of training tokens as a baseline of a loss: against counts made by hand."""

import math
from pathlib import Path

import numpy as np
import pytest

from cola_megatron.data import TokenShards
from cola_megatron.evaluation.likelihood import Texts, baselines
from cola_megatron.evaluation.token_counts import beginning, count_tokens


class Shards:
    """Two sources of two sequences each."""

    rows = np.array([[0, 1, 0, 1], [0, 1, 2, 0], [2, 2, 2, 2], [1, 0, 1, 0]], dtype=np.uint16)
    tokens = 16

    class Stream:
        def __init__(self, first: int):
            self.first = first

        def __len__(self) -> int:
            return 2

    streams = (Stream(0), Stream(2))

    def __getitem__(self, index: int) -> np.ndarray:
        return self.rows[index]


def test_the_counts_are_those_made_by_hand():
    counts = count_tokens(Shards(), vocab_size=4)
    # 6 times 0, 5 times 1, 5 times 2, never 3; one added to each.
    assert counts.unigram == pytest.approx(np.array([7, 6, 6, 1]) / 20)
    found = counts.nats_per_token([[0, 1], [3, 0]])
    alone = -math.log(7 / 20) - math.log(6 / 20) - math.log(1 / 20) - math.log(7 / 20)
    assert found["unigram"] == pytest.approx(alone / 4)
    # After 0 stands 1 in all 4 pairs, so one kind of follower; 3 was never seen before anything.
    after_zero = (4 + 1 * 6 / 20) / (4 + 1)
    first = -math.log(7 / 20) - math.log(1 / 20)
    assert found["bigram"] == pytest.approx((first - math.log(after_zero) - math.log(7 / 20)) / 4)


def test_a_bigram_is_a_distribution():
    counts = count_tokens(Shards(), vocab_size=4)
    for before in range(4):
        ids = [[before, after] for after in range(4)]
        first = -math.log(counts.unigram[before])
        given = [math.exp(-(2 * counts.nats_per_token([pair])["bigram"] - first)) for pair in ids]
        assert sum(given) == pytest.approx(1.0)


def test_a_part_is_counted_of_every_source():
    assert [list(row) for row in beginning(Shards(), 8)] == [[0, 1, 0, 1], [2, 2, 2, 2]]


def test_of_prepared_data_pairs_say_more_than_tokens_alone(corpus: Path):
    held_out, training = TokenShards(corpus, "held_out"), TokenShards(corpus, "train")
    texts = [held_out[index].tolist() for index in range(4)]
    found = baselines(Texts(texts, None, training), 300)
    assert 0 < found["bigram"] < found["unigram"] < math.log(300)
    assert baselines(Texts(texts, None), 300) == {}
