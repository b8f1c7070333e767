"""Duplicates: what counts as one, that planted ones are found and nothing else, and which of a group stays."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.clean.settings import DeduplicationSettings, NearDuplicateSettings
from data_prep.deduplicate import Signatures, clusters, find_pairs, groups, signatures
from data_prep.deduplicate.signatures import NO_KEY, BandKeys, exact_key
from data_prep.errors import DataPrepError
from tests.real_documents import real_documents

pytest.importorskip("datatrove", reason="the extra `prep` is not installed")

WORDS = 300
NGRAM = 5


def signed(texts: list[str], **near: int) -> Signatures:
    sequence = Signatures(DeduplicationSettings(near=near))
    for text in texts:
        sequence.add(text)
    return sequence


def firsts(*tasks: list[str], **near: int) -> list[int]:
    """For each document of these tasks the one that stays in its place."""
    arrays = [signed(texts, **near).arrays() for texts in tasks]
    pairs = [find_pairs([exact for exact, _ in arrays])]
    pairs += [find_pairs([bands[band] for _, bands in arrays]) for band in range(len(arrays[0][1]))]
    return clusters(sum(map(len, tasks)), pairs).tolist()


def different_documents(count: int) -> list[list[str]]:
    """Documents of `WORDS` random words: no two have a 5-gram in common."""
    chooser = random.Random(3)
    return [[random_word(chooser) for _ in range(WORDS)] for _ in range(count)]


def random_word(chooser: random.Random) -> str:
    # Letters: all numbers are one number to MinHash.
    return "".join(chooser.choices("abcdefghijklmnopqrstuvwxyz", k=6))


def changed(words: list[str], places: int, chooser: random.Random) -> list[str]:
    """A copy with other words at so many places, evenly spread: each changes the 5-grams across it."""
    words = list(words)
    for number in range(places):
        words[number * WORDS // places + 7] = random_word(chooser)
    return words


def similarity(places: int) -> float:
    """Share of 5-grams in common, of those in either."""
    ngrams, common = WORDS - NGRAM + 1, WORDS - NGRAM + 1 - NGRAM * places
    return common / (2 * ngrams - common)


def test_planted_near_duplicates_are_found_within_and_across_sources():
    chooser = random.Random(4)
    originals = different_documents(60)
    copies = [changed(words, 2, chooser) for words in originals]
    # One in 15,000 of these pairs escapes.
    assert 1 - (1 - similarity(2) ** 8) ** 14 > 1 - 1 / 15_000
    books = [*originals[:40], *copies[:20]]
    web = [*copies[20:], *originals[40:], *different_documents(80)[60:]]
    found = firsts([" ".join(words) for words in books], [" ".join(words) for words in web])
    expected = [*range(40), *range(20), *range(20, 40)]
    # The copies of the last 20 originals come first in the second source, and stay.
    expected += [*range(80, 100), *range(80, 100), *range(120, 140)]
    assert found == expected


def test_real_documents_stay_unless_they_resemble_an_earlier_one():
    texts = [text for text in real_documents(1000) if len(text) > 1000]
    minhash = BandKeys(NearDuplicateSettings())._minhash
    ngrams = [set(minhash.get_shingles(text)[:, 0].tolist()) for text in texts]
    nearest = [
        max((len(ngrams[one] & ngrams[other]) / len(ngrams[one] | ngrams[other]) for other in range(one)), default=0.0)
        for one in range(len(texts))
    ]
    found = firsts(texts)
    assert len(texts) > 200
    # The chance to meet at 0.4 is 1 in 100, the chance to miss at 0.9 is 1 in 2,500.
    assert all(first == number for number, first in enumerate(found) if nearest[number] < 0.4)
    assert all(first < number for number, first in enumerate(found) if nearest[number] > 0.9)
    assert sum(similar > 0.9 for similar in nearest) >= 2


def test_edited_copies_of_real_documents_are_found():
    originals = [text for text in real_documents(1000) if len(text) > 1000][:100]
    # Case, punctuation and spaces do not count, and a few words hardly.
    edited = [text.upper().replace(",", " ;") + "\nPosted on Monday." for text in originals]
    found = firsts(originals, edited)
    assert sum(first < len(originals) for first in found[len(originals) :]) >= 97


@pytest.mark.parametrize(
    ("places", "least", "most"), [(4, 0.97, 1.0), (9, 0.65, 0.88), (14, 0.18, 0.42), (40, 0.0, 0.02)]
)
def test_the_chance_to_be_found_follows_the_published_curve(places, least, most):
    chooser = random.Random(places)
    originals = different_documents(200)
    copies = [changed(words, places, chooser) for words in originals]
    found = firsts([" ".join(words) for words in originals], [" ".join(words) for words in copies])
    expected = 1 - (1 - similarity(places) ** 8) ** 14
    assert least <= expected <= most
    assert least <= np.mean([first < 200 for first in found[200:]]) <= most


def test_what_an_exact_duplicate_is():
    same = exact_key("Caf\u00e9  in\tthe \n harbour ")
    assert same == exact_key("Cafe\u0301 in the harbour")
    assert same != exact_key("caf\u00e9 in the harbour")
    assert same != exact_key("Caf\u00e9 in the harbour.")
    assert len({exact_key(text) for text in real_documents(2000)}) == 2000


def test_short_documents_are_compared_exactly_only():
    assert firsts(["one two three", "one two THREE", "one two three", ""], ["", "one two three"]) == [0, 1, 0, 3, 3, 0]
    _, bands = signed(["one two three four", "one two three four five"]).arrays()
    assert (bands[:, 0] == NO_KEY).all() and (bands[:, 1] != NO_KEY).all()


def test_each_part_can_be_off(tmp_path):
    for settings, shapes in (
        ({}, ((2, 2), (0, 2))),
        ({"exact": False, "near": {"bands": 3, "rows": 2}}, ((2, 0), (3, 2))),
        ({"exact": False}, ((2, 0), (0, 2))),
    ):
        sequence = Signatures(DeduplicationSettings.model_validate(settings))
        sequence.add("one two three four five six")
        sequence.add("")
        assert tuple(array.shape for array in sequence.arrays()) == shapes
        sequence.save(tmp_path)
        assert Signatures.count(tmp_path) == 2


@pytest.mark.parametrize("texts", [[], real_documents(3)])
def test_signatures_come_back_from_their_files(texts, tmp_path):
    sequence = signed(texts)
    exact, bands = sequence.arrays()
    assert exact.shape == (len(texts), 2) and bands.shape == (14, len(texts))
    sequence.save(tmp_path)
    assert Signatures.count(tmp_path) == len(texts)
    np.testing.assert_array_equal(Signatures.load_exact(tmp_path), exact)
    for band in range(14):
        np.testing.assert_array_equal(Signatures.load_band(tmp_path, band), bands[band])
    assert exact.tobytes() == b"".join(map(exact_key, texts))


def test_band_keys_are_those_of_datatrove():
    from datatrove.pipeline.dedup.minhash import MinhashDedupSignature

    library, ours = MinhashDedupSignature("."), BandKeys(NearDuplicateSettings(numbers_alike=True))
    texts = [*real_documents(60), " ".join(real_documents(40))]
    # The same texts share a band, and no others do: datatrove's hashes of a band are our key.
    copies = [text + " " + text[-300:] for text in texts]
    theirs = [library.get_signature(library.get_shingles(text)) for text in texts + copies]
    keys = np.stack([ours(text) for text in texts + copies])
    for band in range(14):
        groups_of_theirs = {tuple(signature[band]) for signature in theirs}
        pairs = {(tuple(signature[band]), key) for signature, key in zip(theirs, keys[:, band].tolist(), strict=True)}
        assert len(pairs) == len(groups_of_theirs) == len(set(keys[:, band].tolist()))


def test_keys_do_not_depend_on_how_many_ngrams_are_hashed_at_once(monkeypatch):
    texts = real_documents(5)
    _, whole = signed(texts).arrays()
    monkeypatch.setattr(signatures, "NGRAMS_AT_ONCE", 7)
    _, in_pieces = signed(texts).arrays()
    np.testing.assert_array_equal(whole, in_pieces)
    _, other = signed(texts, seed=2).arrays()
    assert not (whole == other).any()


@pytest.mark.parametrize(
    "text", ["", "a", "!?.," * 3000, "x" * 10**6, "word " * 100_000, "😀 " * 500, "\0 \0 a b c d", "\n"]
)
def test_unusual_documents_have_signatures(text):
    exact, bands = signed([text, text]).arrays()
    assert (exact[0] == exact[1]).all() and (bands[:, 0] == bands[:, 1]).all()


@pytest.mark.parametrize("keys_at_once", [10**6, 300, 10])
@pytest.mark.parametrize("width", [1, 2])
def test_pairs_link_to_the_first_of_each_group(width, keys_at_once, tmp_path):
    generator = np.random.default_rng(0)
    spread = np.uint64(0x9E3779B97F4A7C15)
    tasks = []
    for number, count in enumerate((500, 0, 1, 700)):
        keys = generator.integers(0, 400 if width == 1 else 20, (count, width)).astype(np.uint64) * spread
        # As the step gives them: read from files.
        np.save(tmp_path / f"{number}.npy", keys[:, 0] if width == 1 else keys)
        tasks.append(np.load(tmp_path / f"{number}.npy", mmap_mode="r" if count else None))
    first_with: dict[object, int] = {}
    expected = []
    for number, key in enumerate(np.concatenate(tasks).tolist()):
        key = tuple(key) if width == 2 else key
        if key in (NO_KEY, (NO_KEY, NO_KEY)):
            continue
        if key in first_with:
            expected.append([number, first_with[key]])
        first_with.setdefault(key, number)
    assert len(expected) > 100
    assert find_pairs(tasks, keys_at_once).tolist() == expected


@pytest.mark.parametrize("keys_at_once", [10**6, 30])
@pytest.mark.parametrize("shares", [2, 8])
def test_ranges_of_keys_give_the_pairs_of_all(shares, keys_at_once):
    keys = [np.random.default_rng(1).integers(0, 2**64, 200, dtype=np.uint64) for _ in range(2)] * 2
    whole = find_pairs(keys)
    parts = [find_pairs(keys, keys_at_once, share, shares) for share in range(shares)]
    assert len(whole) == 600
    assert sorted(np.concatenate(parts).tolist()) == whole.tolist()
    assert all(len(part) for part in parts)


def test_no_documents_have_no_pairs():
    assert find_pairs([]).shape == find_pairs([np.empty((0, 2), dtype=np.uint64)]).shape == (0, 2)
    assert find_pairs([np.zeros(5, dtype=np.uint64)]).shape == (0, 2)
    assert clusters(0, []).shape == (0,)
    assert clusters(3, [np.empty((0, 2), dtype=np.int64)]).tolist() == [0, 1, 2]


@pytest.mark.parametrize("edges", [0, 30, 90, 200, 2000])
def test_groups_are_connected_components(edges):
    total = 300
    generator = np.random.default_rng(edges)
    pairs = np.sort(generator.integers(0, total, (edges, 2)), axis=1)[:, ::-1]
    smallest = list(range(total))
    for _ in range(total):
        for one, other in pairs.tolist():
            smallest[one] = smallest[other] = min(smallest[one], smallest[other])
    for given in ([pairs], np.array_split(pairs, 7), iter([pairs[::2], pairs[1::2]])):
        assert clusters(total, given).tolist() == smallest


def test_long_chains_become_one_group(monkeypatch):
    total = 200_000
    chain = np.stack([np.arange(1, total), np.arange(total - 1)], axis=1)
    rounds = []
    original = groups._roots
    monkeypatch.setattr(groups, "_roots", lambda *arguments: rounds.append(1) or original(*arguments))
    for pairs in (chain, chain[::-1], np.random.default_rng(0).permutation(chain)):
        rounds.clear()
        assert not clusters(total, [pairs]).any()
        assert len(rounds) < 60


def test_a_missing_package_is_named_with_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "xxhash", None)
    with pytest.raises(DataPrepError, match=r"xxhash is not installed.*deduplication\.near.*make setup EXTRAS=prep"):
        signed([])
    Signatures(DeduplicationSettings()).add("exact duplicates need no package")


def test_files_are_the_same_every_time(tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        signed(real_documents(20)).save(tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
