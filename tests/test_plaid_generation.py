"""Generation and likelihoods of Plaid: by the protocol, independent of the batch, right where the truth is known."""

import math
from typing import Any

import pytest
import torch

from cola_megatron.config.plaid import PlaidModelConfig
from cola_megatron.families.plaid.plaid_lm import PlaidLM
from cola_megatron.families.plaid.sampler import Estimate, Prompts, sample, time_grid
from cola_megatron.families.plaid.settings import BoundSettings, PlaidSettings
from cola_megatron.inference.protocol import Request, TokenBlock, TokenPreview
from cola_megatron.inference.requests import read_settings
from cola_megatron.parallel import gather_state_dict
from tests.ranks import run_ranks
from tests.test_plaid import config_of, model_of
from tests.test_plaid_objective import EMBEDDINGS, JOINT, exact, schedule

STEPS = 6


def language_model(self_conditioning: float = 0.25, tensor_parallel_size: int = 1) -> PlaidLM:
    config = config_of({"self_conditioning": self_conditioning})
    model = model_of(config) if tensor_parallel_size == 1 else model_of(config, tensor_parallel_size)
    weights = gather_state_dict(model, model.groups)
    # Louder than a start, so that the network and not only z_t decides.
    weights["transformer.head.linear.weight"] = 5 * weights["transformer.head.linear.weight"]
    assert isinstance(config.model, PlaidModelConfig)
    return PlaidLM(config.model, weights, None, tensor_parallel_size=tensor_parallel_size)


@pytest.fixture(scope="module")
def plaid() -> PlaidLM:
    return language_model()


def events(model: PlaidLM, requests: list[Request], previews: tuple[int, ...] = (), **options: Any) -> list:
    settings = read_settings(PlaidSettings, {"steps": STEPS, "max_new_tokens": 3, **options})
    session = model.start(requests, settings, 0)
    assert list(session.running) == list(range(len(requests)))
    found = list(session.advance(previews))
    assert not session.running
    return found


REQUESTS = [Request([1, 2, 3], 0), Request([4], 1, 5), Request([7, 8], 2, 4), Request([], 3, 6), Request([9] * 3, 4)]


def blocks(model: PlaidLM, requests: list[Request] = REQUESTS, **options: Any) -> dict[int, list[int]]:
    """By sample id."""
    found = events(model, requests, **options)
    assert all(isinstance(block, TokenBlock) and block.last and not block.repeated for block in found)
    return {requests[block.sample].sample_id: block.token_ids for block in found}


@pytest.mark.parametrize(
    "options", [{}, {"prompt_guidance": 0.0, "temperature": 1.0}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9}]
)
@pytest.mark.parametrize("share", [0, 0.25])
def test_a_sample_does_not_depend_on_its_neighbours(share, options):
    model = language_model(share)
    together = blocks(model, **options)
    assert [len(ids) for _, ids in sorted(together.items())] == [3, 5, 4, 6, 3]
    assert all(0 <= token < model.vocab_size for ids in together.values() for token in ids)
    for request in REQUESTS:
        assert blocks(model, [request], **options) == {request.sample_id: together[request.sample_id]}
    assert blocks(model, REQUESTS[::-1], **options) == together


def test_draws_follow_from_seed_and_id_alone(plaid):
    first = blocks(plaid, [Request([1, 2], 7, 8)])[7]
    assert blocks(plaid, [Request([1, 2], 7, 8)])[7] == first
    assert blocks(plaid, [Request([1, 2], 8, 8)])[8] != first
    assert blocks(plaid, [Request([1, 2], 7, 8)], noise_seed=67)[7] != first
    assert blocks(plaid, [Request([3, 2], 7, 8)])[7] != first
    assert blocks(plaid, [Request([1, 2], 7, 8)], score_temperature=0.5)[7] != first


def test_previews_come_at_the_steps_asked_for_and_change_nothing(plaid):
    found = events(plaid, REQUESTS[:2], (0, STEPS - 1, 99))
    previews = [event for event in found if isinstance(event, TokenPreview)]
    assert [(each.sample, each.step, round(each.time, 6)) for each in previews] == [
        (sample, step, round(1 - step / STEPS, 6)) for step in (0, STEPS - 1) for sample in (0, 1)
    ]
    assert [len(each.token_ids) for each in previews] == [3, 5, 3, 5]
    assert {event.sample: event.token_ids for event in found if isinstance(event, TokenBlock)} == {
        index: blocks(plaid)[index] for index in (0, 1)
    }


def test_a_dropped_sample_costs_nothing_more(plaid):
    session = plaid.start(REQUESTS, PlaidSettings(steps=STEPS, max_new_tokens=3), 0)
    session.drop([0, 3])
    assert session.running == [1, 2, 4]
    assert sorted(block.sample for block in session.advance()) == [1, 2, 4]


def test_a_sample_that_is_admitted_later_is_the_same(plaid):
    session = plaid.start(REQUESTS[:2], PlaidSettings(steps=STEPS, max_new_tokens=3), 0)
    found = list(session.advance())
    session.admit(REQUESTS[2:])
    assert session.running == [2, 3, 4]
    found += list(session.advance())
    assert {block.sample: block.token_ids for block in found} == blocks(plaid)


def test_it_is_a_generator_of_token_ids(plaid):
    found = plaid.generate([[1, 2, 3], []], steps=2, max_new_tokens=[4, 2])
    assert [len(each.token_ids) for each in found] == [4, 2]
    assert [each.finish_reason for each in found] == ["length", "length"]
    streamed = list(plaid.stream([[1, 2]], steps=4, max_new_tokens=4, preview_steps=(1,)))
    assert [type(each).__name__ for each in streamed] == ["Preview", "Piece"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"score_temperature": 0}, "score_temperature=0 must be above 0"),
        ({"score_temperature": math.nan}, "score_temperature=nan must be finite"),
        ({"prompt_guidance": -1}, "prompt_guidance=-1 must be at least 0"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1 must be 1: Plaid settles all tokens"),
        ({"guidance_scale": 2}, "guidance_scale is no setting of generation"),
    ],
)
def test_a_bad_setting_is_refused_in_one_line(plaid, options, line):
    with pytest.raises(ValueError, match=line):
        plaid.generate([[1]], **options)
    with pytest.raises(ValueError, match="samples=0 must be at least 1"):
        BoundSettings(samples=0)


def test_tensor_parallel_ranks_write_the_same_tokens_and_bounds(plaid):
    expected = on_a_rank(1, plaid)
    for tokens, elbos in run_ranks(on_a_rank, 2, 2):
        assert tokens == expected[0]
        assert elbos == pytest.approx(expected[1], rel=1e-4)


def on_a_rank(tensor_parallel_size: int, model: PlaidLM | None = None) -> tuple[dict[int, list[int]], list[float]]:
    model = model or language_model(tensor_parallel_size=tensor_parallel_size)
    found = model.log_likelihood([[1, 2, 3], [4, 5]], [[], [6, 7]], samples=2)
    return blocks(model, prompt_guidance=1.0), [each.elbo for each in found]


# ---- the sampler, with the best denoiser there is ----

BATCH = 4000


def toy_texts(held: int | None = None, guidance: float = 0.0) -> torch.Tensor:
    """Texts of two words of the toy language, (2, B); the first word may be held."""
    made, generator = schedule(32, -5.0, 7.0), torch.Generator().manual_seed(1)
    known = EMBEDDINGS[torch.full((2, BATCH), held or 0)]
    is_held = torch.tensor([held is not None, False])[:, None, None].expand(2, BATCH, 1)

    def predict(z: torch.Tensor, gamma: torch.Tensor, told: torch.Tensor | None) -> Estimate:
        if not guidance:
            return Estimate(exact(z, gamma).estimate_SBC)
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            found = exact(z, gamma)
            log_p = -found.nll_SB[0, :, held].sum()
            return Estimate(found.estimate_SBC.detach(), guidance * torch.autograd.grad(log_p, z)[0])

    with torch.no_grad():
        gammas = made(time_grid(80, torch.device("cpu"))).gamma_B

        def noise() -> torch.Tensor:
            return torch.randn(known.shape, generator=generator, dtype=torch.float64)

        for state in sample(predict, Prompts(known, is_held), noise, gammas, 1.0):
            if held is not None and state.step in (0, 40, 80):  # the prompt's state is q(z_t | prompt) at every time
                level = state.gamma_B[0]
                mean, std = torch.sigmoid(-level).sqrt() * EMBEDDINGS[held], torch.sigmoid(level).sqrt().item()
                assert torch.allclose(state.z_SBC[0].mean(0), mean, atol=5 * std / math.sqrt(BATCH))
                assert state.z_SBC[0].std(0).tolist() == pytest.approx([std, std], rel=0.05)
        return exact(state.z_SBC, state.gamma_B).nll_SB.argmin(-1)


def shares(texts: torch.Tensor) -> torch.Tensor:
    return torch.bincount(3 * texts[0] + texts[1], minlength=9).double().view(3, 3) / texts.shape[1]


def test_samples_of_the_best_denoiser_are_the_language():
    distance = 0.5 * (shares(toy_texts()) - JOINT).abs().sum().item()
    assert distance < 0.03  # of 4,000 draws it is 0.02 by chance, of 80 steps a little more


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_a_held_word_draws_the_other_after_it(guidance):
    """Replacement alone is near the truth; with the gradient of log p(prompt | z_t) it is the truth."""
    for word in range(3):
        texts = toy_texts(word, guidance)
        assert (texts[0] == word).all()
        found, truth, alone = shares(texts)[word], JOINT[word] / JOINT[word].sum(), JOINT.sum(0)
        distance, nobody_held = (0.5 * (other - truth).abs().sum() for other in (found, alone))
        assert distance < (0.03 if guidance else 0.6 * nobody_held)


@pytest.mark.parametrize("share", [0, 0.25])
def test_guidance_by_the_prompt_is_each_samples_own(share):
    model = language_model(share)
    without, together = blocks(model, prompt_guidance=0), blocks(model, prompt_guidance=3.0)
    assert without != together and without[3] == together[3]  # sample 3 has no prompt
    for request in REQUESTS:
        found = blocks(model, [request], prompt_guidance=3.0)
        assert found == {request.sample_id: together[request.sample_id]}


# ---- likelihoods ----

TEXTS, CONTEXTS = [[1, 2, 3], [4, 5], [6], [1, 2, 3]], [[], [6, 7], [], [9]]


def test_a_likelihood_does_not_depend_on_the_batch(plaid):
    told: list[tuple[int, int]] = []
    together = plaid.log_likelihood(TEXTS, CONTEXTS, samples=3, progress=lambda *done: told.append(done))
    assert told[-1] == (6, 6)
    for batch_size in (1, 2, 5):
        found = plaid.log_likelihood(TEXTS, CONTEXTS, samples=3, batch_size=batch_size)
        for one, other in zip(found, together, strict=True):
            assert one.elbo == pytest.approx(other.elbo, rel=1e-5)
    alone = plaid.log_likelihood([TEXTS[1]], [CONTEXTS[1]], [1], samples=3)[0]
    assert alone.elbo == pytest.approx(together[1].elbo, rel=1e-5)


def test_with_a_context_it_is_the_difference_of_two_bounds(plaid):
    both, context = plaid.log_likelihood([[6, 7, 4, 5], [6, 7]], ids=[1, 1], samples=3)
    found = plaid.log_likelihood([[4, 5]], [[6, 7]], [1], samples=3)[0]
    assert found.elbo == pytest.approx(both.elbo - context.elbo, rel=1e-6)
    assert found.elbo == pytest.approx(-(found.reconstruction + found.prior + found.diffusion), rel=1e-6)
    assert found.tokens == 2 and found.perplexity == pytest.approx(math.exp(-found.elbo / 2))
    assert found.bits_per_byte is None and found.text_words is None
    json = found.as_json()
    assert json["elbo"] == found.elbo and len(json["samples"]["log_likelihood"]) == 3


def test_more_draws_agree_within_their_errors(plaid):
    few, many = (plaid.log_likelihood([[1, 2, 3, 4]], samples=count)[0] for count in (32, 256))
    assert few.elbo == pytest.approx(many.elbo, abs=4 * few.elbo_error)
    assert many.elbo_error < few.elbo_error
    assert math.isnan(plaid.log_likelihood([[1]], samples=1)[0].elbo_error)


def test_two_models_of_one_config_answer_from_the_same_inputs(plaid):
    outputs = plaid.fixed_outputs()
    assert outputs["logits"].shape == (12, 3, plaid.vocab_size)
    again = language_model().fixed_outputs()
    assert all(torch.equal(again[name], tensor) for name, tensor in outputs.items())
