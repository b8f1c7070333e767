"""Generation and likelihoods of the autoregressive family: with a cache, in batches, they are those of a plain loop."""

import random

import pytest
import torch

from cola_megatron.config.transformer import TransformerConfig
from cola_megatron.families.autoregressive.likelihood import exact_likelihoods
from cola_megatron.families.autoregressive.session import (
    AutoregressiveGenerator,
    AutoregressiveSession,
    AutoregressiveSettings,
)
from cola_megatron.inference.noise import TOKEN_DRAWS, generator_of
from cola_megatron.inference.protocol import Request
from cola_megatron.inference.sampling import choose_tokens, penalize_repetition
from cola_megatron.inference.scored_texts import ScoredText
from cola_megatron.layers.masks import AttentionMask
from cola_megatron.models.transformer import Transformer
from cola_megatron.parallel import initialize_parallel, initialize_parameters
from tests.ranks import run_ranks

VOCABULARY, PADDING = 61, 60
CAUSAL = AttentionMask(causal=True)
SETTINGS = {
    "greedy": {"repetition_penalty": 1.0},
    "penalized": {},
    "drawn": {"temperature": 1.0, "repetition_penalty": 1.0},
    "top k": {"temperature": 0.8, "top_k": 5},
    "top p": {"temperature": 1.3, "top_p": 0.7, "repetition_penalty": 1.4},
}


def transformer_of(key_value_heads: int | None = 2, *layout) -> Transformer:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        init_std=0.3,
    )
    groups = initialize_parallel(*layout)
    model = Transformer(VOCABULARY, config, groups)
    initialize_parameters(model, 66, groups)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def plain() -> Transformer:
    """As it is trained: nothing is prepared for inference."""
    return transformer_of()


@pytest.fixture(scope="module")
def family() -> AutoregressiveGenerator:
    return AutoregressiveGenerator(transformer_of())


def requests_of(lengths: list[int], seed: int = 0, **options) -> list[Request]:
    chooser = random.Random(seed)
    prompts = [[chooser.randrange(VOCABULARY) for _ in range(length)] for length in lengths]
    return [Request(prompt, 100 + 7 * index, **options) for index, prompt in enumerate(prompts)]


def by_plain_loop(model: Transformer, request: Request, settings: AutoregressiveSettings) -> list[int]:
    """The whole text anew for every token, without cache or batch."""
    ids, found = list(request.token_ids) or [PADDING], []
    seen = torch.zeros(1, VOCABULARY, dtype=torch.bool)
    for place in range(settings.max_new_tokens):
        logits = model(torch.tensor([ids + found]), CAUSAL)[-1:].transpose(0, 1)
        logits = penalize_repetition(logits, seen, settings.repetition_penalty)
        draws = [generator_of(settings.noise_seed, request.sample_id, place, TOKEN_DRAWS, "hashed")]
        token = choose_tokens(logits, settings.temperature, draws, settings.top_k, settings.top_p)
        seen[0, token.item()] = True
        found.append(token.item())
    return found


def run(session: AutoregressiveSession) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {index: [] for index in session.running}
    while session.running:
        for block in session.advance():
            assert block.repeated == 0 and block.latents is None
            found[block.sample] += block.token_ids
            assert block.last == (block.sample not in session.running)
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_a_session_is_a_plain_loop_over_each_prompt_alone(plain, family, name):
    settings, requests = AutoregressiveSettings(max_new_tokens=9, **SETTINGS[name]), requests_of([5, 0, 1, 5, 12, 2, 5])
    together = run(family.start(requests, settings, PADDING))
    for index, request in enumerate(requests):
        assert together[index] == by_plain_loop(plain, request, settings), index
        assert run(family.start([request], settings, PADDING)) == {0: together[index]}


@pytest.mark.parametrize("key_value_heads", [1, 4])
def test_other_numbers_of_shared_heads(key_value_heads):
    model, settings = transformer_of(key_value_heads), AutoregressiveSettings(max_new_tokens=6)
    family, requests = AutoregressiveGenerator(transformer_of(key_value_heads)), requests_of([3, 8])
    together = run(family.start(requests, settings, PADDING))
    assert together == {index: by_plain_loop(model, request, settings) for index, request in enumerate(requests)}


def test_samples_end_at_their_own_length_and_those_that_are_dropped_cost_nothing(family):
    settings = AutoregressiveSettings(max_new_tokens=8)
    requests = [*requests_of([4, 6]), *requests_of([3, 3], max_new_tokens=3)]
    whole = run(family.start(requests, settings, PADDING))
    assert [len(whole[index]) for index in range(4)] == [8, 8, 3, 3]
    session = family.start(requests, settings, PADDING)
    first = {block.sample: block.token_ids for block in session.advance()}
    session.drop([0, 2])
    assert session.running == [1, 3]
    assert {index: first[index] + ids for index, ids in run(session).items()} == {1: whole[1], 3: whole[3]}
    session.drop([1])
    assert list(session.advance()) == []


@pytest.mark.parametrize("name", SETTINGS)
def test_a_sample_that_is_admitted_later_is_the_same(family, name):
    settings, requests = AutoregressiveSettings(max_new_tokens=6, **SETTINGS[name]), requests_of([5, 0, 9, 1, 12, 2])
    expected = run(family.start(requests, settings, PADDING))
    session, found = family.start(requests[:2], settings, PADDING), {index: [] for index in range(len(requests))}
    waiting, rounds = requests[2:], 0
    while session.running:
        for block in session.advance():
            found[block.sample] += block.token_ids
        rounds += 1
        if waiting and rounds % 2 == 0:
            session.admit([waiting.pop(0)])
    assert found == expected and session.running == []


@pytest.mark.parametrize("at_once", [2, 3, 50])
def test_several_tokens_at_once_are_the_same_tokens(family, at_once):
    requests = [*requests_of([4, 6]), *requests_of([30], max_new_tokens=2)]
    expected = run(family.start(requests, AutoregressiveSettings(max_new_tokens=7, temperature=1.0), PADDING))
    settings = AutoregressiveSettings(max_new_tokens=7, temperature=1.0, tokens_at_once=at_once)
    assert run(family.start(requests, settings, PADDING)) == expected


def test_a_draw_depends_on_seed_and_sample_alone(family):
    prompt = requests_of([4])[0].token_ids

    def written(sample_id: int, **options) -> dict[int, list[int]]:
        settings = AutoregressiveSettings(max_new_tokens=12, temperature=1.0, **options)
        return run(family.start([Request(prompt, sample_id)], settings, PADDING))

    assert written(1) == written(1) != written(2)
    assert written(1, noise_seed=67) != written(1)


def test_a_number_of_tokens_that_is_none_is_refused():
    with pytest.raises(ValueError, match="tokens_at_once=0 must be at least 1"):
        AutoregressiveSettings(tokens_at_once=0)


def texts_of(lengths: list[tuple[int, int]]) -> list[ScoredText]:
    chooser = random.Random(1)
    return [
        ScoredText(*(tuple(chooser.randrange(VOCABULARY) for _ in range(length)) for length in pair), index, 10, 3)
        for index, pair in enumerate(lengths)
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_a_likelihood_is_the_sum_over_a_plain_softmax(plain, batch_size):
    texts = texts_of([(3, 4), (0, 7), (6, 1), (5, 2), (0, 1), (3, 4), (9, 12)])
    seen = []
    found = exact_likelihoods(plain, texts, PADDING, batch_size, lambda *done: seen.append(done))
    for text, likelihood in zip(texts, found, strict=True):
        context = text.context_ids or (PADDING,)
        log_p = plain(torch.tensor([context + text.token_ids]), CAUSAL)[:, 0].double().log_softmax(-1)
        places = range(len(context) - 1, len(context) + len(text.token_ids) - 1)
        expected = sum(log_p[place, token].item() for place, token in zip(places, text.token_ids, strict=True))
        assert likelihood.log_likelihood == likelihood.elbo == pytest.approx(expected, rel=1e-5)
        assert likelihood.tokens == len(text.token_ids)
        assert likelihood.perplexity == pytest.approx(2.718281828 ** (-expected / likelihood.tokens), rel=1e-4)
        assert likelihood.bits_per_byte == pytest.approx(-expected / 10 / 0.693147, rel=1e-4)
        assert likelihood.as_json()["log_likelihood"] == likelihood.log_likelihood
    assert seen[-1] == (len(texts), len(texts))


def test_a_text_is_greedy_exactly_where_decoding_writes_it(family, plain):
    settings = AutoregressiveSettings(max_new_tokens=5, repetition_penalty=1.0)
    requests = requests_of([4, 0, 7])
    written = run(family.start(requests, settings, PADDING))
    texts = [ScoredText(tuple(each.token_ids), tuple(written[i]), i, None, None) for i, each in enumerate(requests)]
    other = [each._replace(token_ids=(*each.token_ids[:-1], (each.token_ids[-1] + 1) % VOCABULARY)) for each in texts]
    found = exact_likelihoods(plain, [*texts, *other], PADDING, 4)
    assert [each.is_greedy for each in found] == [True] * 3 + [False] * 3
    assert found[0].bits_per_byte is None


def test_a_likelihood_and_its_parts_add_up(plain):
    (text,) = texts_of([(3, 8)])
    ids = text.token_ids
    first = text._replace(token_ids=ids[:5])
    second = text._replace(context_ids=text.context_ids + ids[:5], token_ids=ids[5:])
    whole, *parts = (each.log_likelihood for each in exact_likelihoods(plain, [text, first, second], PADDING, 8))
    assert whole == pytest.approx(sum(parts), rel=1e-6)


def test_without_a_context_there_must_be_a_token_to_begin_from(plain):
    with pytest.raises(ValueError, match="needs padding_id"):
        exact_likelihoods(plain, texts_of([(0, 3)]), None, 8)


def generated_on_a_rank(ranks: int) -> tuple[dict[int, list[int]], list[float]]:
    model = transformer_of(2, ranks)
    texts = exact_likelihoods(model, texts_of([(3, 4), (0, 7)]), PADDING, 8)
    session = AutoregressiveGenerator(model).start(
        requests_of([4, 0, 9]), AutoregressiveSettings(max_new_tokens=6, temperature=0.9), PADDING
    )
    return run(session), [text.log_likelihood for text in texts]


def test_tensor_parallel_ranks_write_what_one_process_writes():
    (expected,) = run_ranks(generated_on_a_rank, 1, 1)
    for found in run_ranks(generated_on_a_rank, 2, 2):
        assert found[0] == expected[0]
        assert found[1] == pytest.approx(expected[1], rel=1e-5)
