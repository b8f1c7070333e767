"""`ColaDLM` as a library: what it refuses, and the whole of it in bfloat16."""

import re
from pathlib import Path

import pytest
import torch

from cola_megatron import ColaDLM
from cola_megatron.families.cola.published import PublishedModel
from cola_megatron.inference.settings import FlowSettings

FOLDER = Path(__file__).parent / "data" / "reference_tiny"  # vocabulary 320, 8 channels, VAE and DiT blocks of 4
IDS = list(range(100, 116))


@pytest.fixture(scope="module")
def model() -> ColaDLM:
    return ColaDLM.from_published(FOLDER, device="cpu")


def latents(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "length divisible by patch_size = 1, not of shape (0,)"),
        ([IDS], "one sequence"),
        ([1.0, 2.0, 3.0, 4.0], "ids must be integers, not torch.float32"),
        ([True, False, True, True], "ids must be integers, not torch.bool"),
        ([0, 1, 2, 321], "0 .. 320 (320 is [MASK])"),
        ([0, 1, 2, -1], "0 .. 320"),
    ],
)
def test_encode_refuses(model, ids, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model.encode(ids)


def test_encode_takes_a_partial_last_block(model):
    """Blocks are causal: the rest of the text changes nothing before it."""
    whole, partial = model.encode(IDS), model.encode(IDS[:14])
    for full, cut in zip(whole, partial, strict=True):
        assert cut.shape == (14, 8)
        torch.testing.assert_close(cut[:12], full[:12], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("z", "lengths", "message"),
    [
        (latents(8, 7), [8], "z must have shape (rows, d) with d = 8 channels, not (8, 7)"),
        (latents(1, 8, 8), [8], "(rows, d) with d = 8 channels, not (1, 8, 8)"),
        (latents(8), [1], "(rows, d) with d = 8 channels, not (8,)"),
        (latents(8, 8), [4, 3], "[4, 3] must be positive and add up to the 8 rows of z"),
        (latents(8, 8), [8, 0], "must be positive"),
        (latents(8, 8), [7.6], "lengths must be integers"),
    ],
)
def test_decode_refuses(model, z, lengths, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model.decode(z, lengths)


@pytest.mark.parametrize(
    ("clean", "noisy", "t", "message"),
    [
        ((1, 8, 7), (1, 8, 7), [0.5], "z_clean must have shape (B, L, d) with d = 8 channels, not (1, 8, 7)"),
        ((1, 8, 8), (8, 8), [0.5], "z_noisy must have shape (B, L, d) with d = 8 channels, not (8, 8)"),
        ((1, 8, 8), (1, 4, 8), [0.5], "must agree"),
        ((1, 6, 8), (1, 6, 8), [0.5], "length divisible by block_size=4"),
        ((1, 8, 8), (1, 8, 8), [0.5, 0.5], "it must be (1,) or (1, 2)"),
        ((1, 8, 8), (1, 8, 8), [1.5], "t=1.5 must lie in 0 .. 1"),
        ((1, 8, 8), (1, 8, 8), [[0.5, -0.25]], "t=-0.25 must lie in 0 .. 1"),
        ((1, 8, 8), (1, 8, 8), [float("nan")], "t=nan must lie in 0 .. 1"),
    ],
)
def test_velocity_refuses(model, clean, noisy, t, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model.velocity(latents(*clean), latents(*noisy), torch.tensor(t))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": ["the", [5, 320]]}, "prompts[1]: token id 320 must lie in 0 .. 319"),
        ({"prompts": [[5, -1]]}, "prompts[0]: token id -1 must lie in 0 .. 319"),
        ({"prompts": [[5, 1.5]]}, "prompts[0] must be integers"),
        ({"ids": [0, 1]}, "1 prompts but 2 ids"),
        ({"ids": [0.5]}, "ids must be integers"),
        ({"ids": [2**52 + 1]}, f"ids: {2**52 + 1} must lie in"),
        ({"ids": [-(2**52) - 1]}, "must lie in"),
        ({"noise_seed": 2**62 + 1}, f"noise_seed={2**62 + 1} must lie in"),
        ({"noise_seed": 1.5}, "noise_seed=1.5 must be an integer"),
        ({"steps": 2.5}, "steps=2.5 must be an integer"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan must be finite"),
        ({"guidance_scale": float("inf")}, "guidance_scale=inf must be finite"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty=nan must be finite"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be above 0"),
        ({"padding_id": 320}, "padding_id=320 must lie in 0 .. 319"),
    ],
)
def test_generate_refuses(model, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model.generate(**({"prompts": ["the"]} | settings))


def test_token_ids_are_a_prompt_in_any_form_of_integers(model):
    prompt = model.tokenizer.encode("the prior carries", add_special_tokens=False).ids
    settings = {"steps": 2, "max_new_tokens": 4}
    outputs = [model.generate([given], **settings)[0] for given in ("the prior carries", prompt, torch.tensor(prompt))]
    assert all(torch.equal(output.token_ids, outputs[0].token_ids) for output in outputs)


def test_a_temperature_below_a_hundred_thousandth_is_greedy(model):
    settings = {"steps": 2, "max_new_tokens": 8, "repetition_penalty": 1.0}
    greedy, nearly = (model.generate(["the"], temperature=value, **settings)[0] for value in (0.0, 9e-6))
    assert torch.equal(greedy.token_ids, nearly.token_ids)


def test_bfloat16_on_the_cpu_computes_what_float32_computes(model):
    half = ColaDLM.from_published(FOLDER, device="cpu", dtype=torch.bfloat16)
    assert {weight.dtype for network in (half.vae, half.dit) for weight in network.parameters()} == {torch.bfloat16}
    z_clean, z_noisy = latents(2, 1, 8, 8)

    def outputs(of: ColaDLM) -> list[torch.Tensor]:
        sampled = of.generate(["the prior", ""], steps=4, max_new_tokens=8, temperature=0.7, guidance_scale=1.0)
        assert [len(output.token_ids) for output in sampled] == [8, 8]
        return [
            *of.encode(IDS),
            of.decode(z_noisy[0], [4, 4]),
            of.velocity(z_clean, z_noisy, torch.tensor([0.4])),
            of.generate(["the prior", ""], steps=4, max_new_tokens=8)[0].latents,
        ]

    for found, expected in zip(outputs(half), outputs(model), strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() <= 0.05 * expected.abs().max()


def test_a_model_knows_the_token_that_ends_a_text(model):
    assert model.end_of_text_ids == (model.tokenizer.token_to_id("<|endoftext|>"),)


def test_one_text_where_a_list_belongs_is_refused_and_not_taken_letter_by_letter(model):
    for use in (model.generate, model.log_likelihood, lambda text: model.reconstruction_curve(text, [0.5])):
        with pytest.raises(ValueError, match=re.escape("must be a list: give ['hello']")):
            use("hello")
    with pytest.raises(ValueError, match="contexts must be a list"):
        model.log_likelihood(["hello"], "hello")


def test_token_ids_are_continued_without_a_tokenizer(model):
    published = PublishedModel(FOLDER)
    bare = ColaDLM(published.config, {name: published.read(name) for name in published.shapes}, None)
    settings, whole = {"steps": 2, "max_new_tokens": 4}, [5, 6, 7, 8]
    expected, found = (each.generate([whole], **settings)[0] for each in (model, bare))
    assert torch.equal(found.token_ids, expected.token_ids) and found.text == ""
    assert len(bare.generate([[5]], padding_id=2, **settings)[0].token_ids) == 4
    for prompts, options, words in (
        ([[5]], {}, "need padding_id"),
        ([whole], {"stop": ["a"]}, "stop texts need a tokenizer"),
        (["a"], {}, "give token ids"),
    ):
        with pytest.raises(ValueError, match=words):
            bare.generate(prompts, **settings, **options)


def test_no_stop_texts_may_be_written_as_none():
    assert FlowSettings(stop=None, end_of_text=None) == FlowSettings()


def test_a_sample_has_other_draws_by_the_hashed_formula(model):
    settings = {"steps": 2, "max_new_tokens": 8}
    published, hashed, again = (
        model.generate(["the"], noise=noise, **settings)[0].latents for noise in ("published", "hashed", "hashed")
    )
    assert not torch.equal(published, hashed) and torch.equal(hashed, again)
    with pytest.raises(ValueError, match="noise=other must be one of published, hashed"):
        model.generate(["the"], noise="other", **settings)
