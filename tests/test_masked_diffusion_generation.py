"""Generation by unmasking is the plain loop, token for token; and what a session promises of any family.

Shapes: L tokens, T tokens of a block, V vocabulary.
"""

import math

import pytest
import torch

from cola_megatron.config.masked_diffusion import MaskedDiffusionModelConfig
from cola_megatron.config.transformer import TransformerConfig
from cola_megatron.families.masked_diffusion.session import MaskedDiffusionGenerator
from cola_megatron.families.masked_diffusion.settings import MaskedDiffusionSettings
from cola_megatron.inference.noise import REPAINT_DRAWS, TOKEN_DRAWS, generator_of
from cola_megatron.inference.protocol import Request, TokenPreview
from cola_megatron.layers.masks import block_causal_mask
from cola_megatron.models.transformer import Transformer
from cola_megatron.parallel import initialize_parallel, initialize_parameters
from tests.support import perturbed

VOCABULARY = 40
PROMPTS = [[3, 5, 8, 1, 30, 22, 9], [7], [12, 4, 4, 39, 2, 15, 6, 11, 25], [], [3, 5, 8, 1, 30, 22, 9]]
# Without a prompt all positions see the same and are equally sure: their order is then one of rounding errors.
WITH_TOKENS = [prompt for prompt in PROMPTS if prompt]
NETWORK = TransformerConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_key_value_heads=2
)
Model = tuple[Transformer, MaskedDiffusionModelConfig]


def network(block_size: int | None = None, mask_token_id: int | None = None) -> Model:
    config = MaskedDiffusionModelConfig(
        vocab_size=VOCABULARY, transformer=NETWORK, block_size=block_size, mask_token_id=mask_token_id
    )
    groups = initialize_parallel()
    transformer = Transformer(VOCABULARY, NETWORK, groups, extra_rows=config.extra_rows)
    initialize_parameters(transformer, 1, groups)
    return perturbed(transformer, 0.3).requires_grad_(False).eval(), config


def generated(
    model: Model,
    prompts: list[list[int]],
    ids: list[int] | None = None,
    lengths: list[int] | None = None,
    **options,
) -> list[list[int]]:
    """New tokens of each prompt."""
    settings = MaskedDiffusionSettings(**{"max_new_tokens": 12, **options})
    requests = [
        Request(prompt, index if ids is None else ids[index], None if lengths is None else lengths[index])
        for index, prompt in enumerate(prompts)
    ]
    session = MaskedDiffusionGenerator(*model).start(requests, settings, padding_id=0)
    found: list[list[int]] = [[] for _ in prompts]
    while session.running:
        for block in session.advance():
            found[block.sample] += block.token_ids[block.repeated :]
            assert block.last == (block.sample not in session.running)
    return found


def plain_loop(model: Model, prompt: list[int], sample_id: int, new: int = 12, **options) -> list[int]:
    """One text, no cache: the whole of it is computed again in every step, as the papers write it."""
    transformer, config = model
    settings, mask_id = MaskedDiffusionSettings(**options), config.mask_id
    size = config.block_size or settings.block_length or new
    end = len(prompt) + new
    length = end if config.block_size is None else -(-end // size) * size
    tokens_L = torch.tensor(prompt + [mask_id] * (length - len(prompt)))
    first = len(prompt) if config.block_size is None else len(prompt) // size * size
    for number, start in enumerate(range(first, length, size)):
        stop = min(start + size, length)
        masked = int((tokens_L[start:stop] == mask_id).sum())
        steps = (
            masked
            if settings.steps is None
            else min(masked, math.ceil(settings.steps * masked / (length - len(prompt))))
        )
        draws = generator_of(settings.noise_seed, sample_id, number, TOKEN_DRAWS, "hashed")
        choice = generator_of(settings.noise_seed, sample_id, number, REPAINT_DRAWS, "hashed")
        for step in range(steps):

            def logits(seen_L: torch.Tensor, start: int = start, stop: int = stop) -> torch.Tensor:
                # By blocks nothing behind the block exists yet.
                seen_L = seen_L if config.block_size is None else seen_L[:stop]
                mask = block_causal_mask(len(seen_L), config.block_size or len(seen_L), seen_L.device)
                return transformer(seen_L[None], mask)[start:stop, 0]

            logits_TV = logits(tokens_L)
            if settings.guidance_scale:
                without_L = tokens_L.clone()
                without_L[: len(prompt)] = mask_id
                alone_TV = logits(without_L)
                logits_TV = alone_TV + (settings.guidance_scale + 1) * (logits_TV - alone_TV)
            if mask_id < VOCABULARY:
                logits_TV[:, mask_id] = -torch.inf
            probabilities_TV = logits_TV.double().softmax(-1)
            if settings.temperature:
                ids_T = torch.multinomial((logits_TV / settings.temperature).softmax(-1), 1, generator=draws)[:, 0]
            else:
                ids_T = logits_TV.argmax(-1)
            confidence_T = probabilities_TV.gather(1, ids_T[:, None])[:, 0]
            if settings.remasking == "random":
                confidence_T = torch.rand(stop - start, generator=choice)
            open_T = tokens_L[start:stop] == mask_id
            n = masked // steps + (step < masked % steps)
            for _ in range(n):
                best = int(confidence_T.masked_fill(~open_T, -1).argmax())
                tokens_L[start + best], open_T[best] = ids_T[best], False
    return tokens_L[len(prompt) : end].tolist()


WAYS = {
    "one token a step": {},
    "a few steps": {"steps": 5},
    "one step": {"steps": 1},
    "semi-autoregressive": {"block_length": 5, "steps": 6},
    "random": {"remasking": "random", "steps": 4},
    "drawn": {"temperature": 0.7, "steps": 6},
    "drawn, random, semi-autoregressive": {"temperature": 1.0, "remasking": "random", "block_length": 4},
    "guided": {"guidance_scale": 1.5, "steps": 7},
    "guided, drawn": {"guidance_scale": 0.5, "temperature": 0.5, "block_length": 6},
}


@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize("way", WAYS)
def test_unmasking_is_the_plain_loop_token_for_token(way, block_size):
    options = {name: value for name, value in WAYS[way].items() if block_size is None or name != "block_length"}
    model = network(block_size)
    expected = [plain_loop(model, prompt, index, **options) for index, prompt in enumerate(WITH_TOKENS)]
    assert generated(model, WITH_TOKENS, **options) == expected
    assert len({tuple(tokens) for tokens in expected}) > 2


def test_a_mask_of_the_vocabulary_is_never_written():
    model = network(mask_token_id=17)
    transformer = model[0]
    transformer.head.linear.weight[17] = 0
    transformer.head.linear.weight[17] += 5 * transformer.head.linear.weight.mean(0)
    found = generated(model, WITH_TOKENS, steps=3)
    assert found == [plain_loop(model, prompt, index, steps=3) for index, prompt in enumerate(WITH_TOKENS)]
    assert all(17 not in tokens for tokens in found)


@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.8, "remasking": "random", "guidance_scale": 0.7, "steps": 5}]
)
def test_a_sample_does_not_depend_on_its_neighbours(block_size, options):
    model, lengths = network(block_size), [12, 3, 7, 9, 5]
    together = generated(model, PROMPTS, lengths=lengths, **options)
    assert [len(tokens) for tokens in together] == lengths
    for index, prompt in enumerate(PROMPTS):
        assert generated(model, [prompt], [index], [lengths[index]], **options) == [together[index]]
    backwards = generated(model, PROMPTS[::-1], list(range(5))[::-1], lengths[::-1], **options)
    assert backwards == together[::-1]


def test_draws_depend_on_the_sample_s_id_and_the_seed():
    model = network()
    same = generated(model, [PROMPTS[0]] * 2, ids=[4, 4], temperature=1.0)
    assert same[0] == same[1]
    assert same[0] != generated(model, [PROMPTS[0]], ids=[5], temperature=1.0)[0]
    assert same[0] != generated(model, [PROMPTS[0]], ids=[4], temperature=1.0, noise_seed=2)[0]


@pytest.mark.parametrize("block_size", [None, 4])
def test_a_sample_that_is_dropped_leaves_the_others_as_they_are(block_size):
    model, options = network(block_size), {"block_length": None if block_size else 4, "guidance_scale": 0.5}
    expected = generated(model, PROMPTS, **options)
    settings = MaskedDiffusionSettings(max_new_tokens=12, **options)
    session = MaskedDiffusionGenerator(*model).start(
        [Request(prompt, index) for index, prompt in enumerate(PROMPTS)], settings, padding_id=0
    )
    found: list[list[int]] = [[] for _ in PROMPTS]
    rounds = 0
    while session.running:
        for block in session.advance():
            found[block.sample] += block.token_ids[block.repeated :]
        rounds += 1
        if rounds == 1:
            session.drop([0, 3])
            assert session.running == [1, 2, 4]
    for index, tokens in enumerate(found):
        assert tokens == expected[index][: len(tokens)] and (len(tokens) == 12) == (index not in (0, 3))


@pytest.mark.parametrize("block_size", [None, 4])
def test_a_sample_that_is_admitted_later_is_the_same(block_size):
    model, options = network(block_size), {"block_length": None if block_size else 4, "guidance_scale": 0.5}
    expected = generated(model, PROMPTS, **options)
    requests = [Request(prompt, index) for index, prompt in enumerate(PROMPTS)]
    settings = MaskedDiffusionSettings(max_new_tokens=12, **options)
    session = MaskedDiffusionGenerator(*model).start(requests[:2], settings, padding_id=0)
    found: list[list[int]] = [[] for _ in PROMPTS]
    waiting = requests[2:]
    while session.running:
        for block in session.advance():
            found[block.sample] += block.token_ids[block.repeated :]
        if waiting:
            session.admit([waiting.pop(0)])
    assert found == expected


def test_by_blocks_the_first_block_repeats_the_end_of_the_prompt():
    settings = MaskedDiffusionSettings(max_new_tokens=6)
    session = MaskedDiffusionGenerator(*network(4)).start([Request(PROMPTS[0], 0)], settings, padding_id=0)
    blocks = []
    while session.running:
        blocks += session.advance()
    assert [len(block.token_ids) for block in blocks] == [4, 4, 1]  # the prompt has seven tokens
    assert blocks[0].token_ids[:3] == PROMPTS[0][4:] and [block.repeated for block in blocks] == [3, 0, 0]
    assert [block.last for block in blocks] == [False, False, True]


@pytest.mark.parametrize("block_size", [None, 4])
def test_previews_show_what_is_unmasked_so_far(block_size):
    settings = MaskedDiffusionSettings(max_new_tokens=8, steps=4, block_length=None if block_size else 4)
    session = MaskedDiffusionGenerator(*network(block_size)).start([Request([3, 5, 8, 1], 0)], settings, padding_id=0)
    first, second, block = session.advance(preview_steps=[0, 1, 7])
    assert isinstance(first, TokenPreview) and isinstance(second, TokenPreview)
    assert (first.sample, first.step, first.time, first.repeated) == (0, 0, 0.5, 0)
    assert (second.step, second.time, second.token_ids) == (1, 0.0, block.token_ids)
    assert len(first.token_ids) == 2
    remaining = iter(block.token_ids)
    assert all(token in remaining for token in first.token_ids)  # in their order


def test_a_repetition_penalty_is_taken_of_what_the_sample_has_written():
    model = network()
    free, penalized = (generated(model, PROMPTS[:3], repetition_penalty=penalty) for penalty in (1.0, 1e6))
    for one, other in zip(free, penalized, strict=True):
        assert len(set(other)) >= len(set(one))
    # One token is written a step, and a positive logit that is divided by a million wins no more.
    assert all(len(set(tokens)) == 12 for tokens in penalized)
    assert generated(model, PROMPTS[2:3], [2], repetition_penalty=1e6) == penalized[2:]


def test_a_prompt_that_holds_mask_is_refused():
    with pytest.raises(ValueError, match=r"prompts\[1\] holds token id 17, which is \[MASK\]"):
        generated(network(mask_token_id=17), [[1], [2, 17]])


def test_a_model_of_blocks_has_blocks_of_its_own():
    assert generated(network(4), PROMPTS, block_length=4) == generated(network(4), PROMPTS)
    with pytest.raises(ValueError, match="block_length=8: this model was trained by blocks of 4"):
        generated(network(4), PROMPTS, block_length=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0 must be"),
        ({"block_length": 2.5}, "block_length=2.5 must be"),
        ({"remasking": "none"}, "remasking=none must be one of low_confidence, random"),
        ({"guidance_scale": -1}, "guidance_scale=-1 must be"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan must be"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MaskedDiffusionSettings(**options)
