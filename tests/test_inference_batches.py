"""A sample does not depend on its batch: alone, with any neighbours, with neighbours that end before it."""

import random
from pathlib import Path

import pytest
import torch

from cola_megatron.inference import decoder, generate, prior
from cola_megatron.inference.cached_attention import MaskedBlocks, NewBlocks, packs
from cola_megatron.inference.kv_cache import KeyValueCache
from cola_megatron.inference.protocol import Generation, Piece, Preview, Request
from cola_megatron.interface import ColaDLM

FOLDER = Path(__file__).parent / "data" / "reference_tiny"  # blocks of 4 latents, a token each
# Of 0 to 46 tokens: without a context, with whole blocks, with parts of one.
PROMPTS = [
    "",
    "the",
    "noise",
    "the prior carries",
    "latent space is smooth",
    "the prior carries meaning and the decoder writes words",
    "noise becomes structure along a learned flow . latent space is smooth when the masked loss",
    "a block",
    "the decoder writes",
]
IDS = [3, -7, 2**40, 0, 11, 5, 6, 8, 1]
# Not zero: another processor may sum in another order. On the one this was written on they are equal bit for bit.
LATENTS = 1e-4

SETTINGS = {
    "greedy": {},
    "drawn": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.0},
    "heun, guidance in an interval": {"solver": "heun", "guidance_interval": (0.2, 0.7)},
    "multistep": {"solver": "adams_bashforth", "guidance_scale": 3.0},
    "partial repaint": {"first_block": "partial_repaint", "repaint_until": 0.3, "repaint_rounds": 2},
    "left pad": {"first_block": "left_pad"},
    "right pad": {"first_block": "right_pad"},
    "adaptive steps": {"steps": 12, "settle_every": 1},
}


@pytest.fixture(scope="module")
def model() -> ColaDLM:
    return ColaDLM.from_published(FOLDER, device="cpu")


def run(model: ColaDLM, members: list[int], **options) -> list[Generation]:
    options = {"steps": 4, "max_new_tokens": 12} | options
    return model.generate([PROMPTS[i] for i in members], [IDS[i] for i in members], **options)


def assert_same(found: Generation, expected: Generation) -> None:
    assert torch.equal(found.token_ids, expected.token_ids)
    assert (found.text, found.prompt_tokens, found.finish_reason) == (
        expected.text,
        expected.prompt_tokens,
        expected.finish_reason,
    )
    torch.testing.assert_close(found.latents, expected.latents, rtol=0, atol=LATENTS)


@pytest.mark.parametrize("name", SETTINGS)
def test_alone_and_in_any_batch(model, name):
    alone = [run(model, [member], **SETTINGS[name])[0] for member in range(len(PROMPTS))]
    chooser = random.Random(name)
    for _ in range(6):
        members = chooser.sample(range(len(PROMPTS)), chooser.randint(2, len(PROMPTS)))
        for member, found in zip(members, run(model, members, **SETTINGS[name]), strict=True):
            assert_same(found, alone[member])


def test_in_batches_of_any_size(model):
    members = list(range(len(PROMPTS)))
    expected = run(model, members)
    for batch_size in (1, 2, 4, 100):
        for found, one in zip(run(model, members, batch_size=batch_size), expected, strict=True):
            assert_same(found, one)


def test_a_place_that_is_left_is_given_to_the_next_prompt(model, monkeypatch):
    members, lengths = list(range(len(PROMPTS))), [16, 4, 24, 8, 12, 4, 8, 20, 4]
    rows = []
    draw = prior.BlockPrior.draw
    monkeypatch.setattr(
        prior.BlockPrior, "draw", lambda self, noise, first: rows.append(noise.shape[1]) or draw(self, noise, first)
    )
    for options in ({}, SETTINGS["partial repaint"], SETTINGS["drawn"], SETTINGS["multistep"]):
        alone = [run(model, [member], max_new_tokens=lengths[member], **options)[0] for member in members]
        rows.clear()
        found = run(model, members, max_new_tokens=lengths, batch_size=3, **options)
        # 25 blocks in 3 places: none is free before the end.
        assert rows == [3] * 8 + [1]
        for one, own in zip(found, alone, strict=True):
            assert_same(one, own)


def test_neighbours_that_end_early_leave_the_batch_and_change_nothing(model, monkeypatch):
    members, lengths = [6, 0, 5, 3, 1], [16, 4, 24, 8, 12]
    rows = []
    draw = prior.BlockPrior.draw
    monkeypatch.setattr(
        prior.BlockPrior, "draw", lambda self, noise, first: rows.append(noise.shape[1]) or draw(self, noise, first)
    )
    together = run(model, members, max_new_tokens=lengths)
    assert rows == [5, 4, 3, 2, 1, 1]
    for member, length, found in zip(members, lengths, together, strict=True):
        assert_same(found, run(model, [member], max_new_tokens=length)[0])
        assert len(found.token_ids) == length and found.finish_reason == "length"


def test_a_stop_text_ends_one_sample_and_not_its_neighbours(model):
    members = [1, 3, 5]
    free = run(model, members, max_new_tokens=24, repetition_penalty=1.0)
    stop = free[0].text[4:6]
    stopped = run(model, members, max_new_tokens=24, repetition_penalty=1.0, stop=stop)
    for found, whole in zip(stopped, free, strict=True):
        assert found.text == whole.text.split(stop)[0]
        assert found.finish_reason == ("stop" if stop in whole.text else "length")
        assert torch.equal(found.token_ids, whole.token_ids[: len(found.token_ids)])
    assert len(stopped[0].token_ids) < 24 == max(len(found.token_ids) for found in stopped)


def test_an_end_of_text_token_ends_a_sample(model):
    (free,) = run(model, [5], max_new_tokens=16)
    token = int(free.token_ids[9])
    first = free.token_ids[free.prompt_tokens :].tolist().index(token)
    (ended,) = run(model, [5], max_new_tokens=16, end_of_text=token)
    assert ended.finish_reason == "end_of_text"
    kept = free.token_ids[free.prompt_tokens :][:first].tolist()
    assert ended.text == model.tokenizer.decode(kept, skip_special_tokens=False)


def test_the_masked_form_gives_the_same(model, monkeypatch):
    members = list(range(len(PROMPTS)))
    expected = run(model, members)
    for module in (prior, decoder):
        monkeypatch.setattr(module, "blocks_for", lambda device: MaskedBlocks)
    for found, one in zip(run(model, members), expected, strict=True):
        assert_same(found, one)


@pytest.mark.parametrize("form", [NewBlocks, MaskedBlocks])
def test_new_blocks_see_their_own_context_and_nothing_else(form):
    lengths, size, heads, channels = [0, 4, 4, 12], 4, 2, 8
    cache = KeyValueCache()
    cache.add(4, 16)
    keys, values = cache.of_layer("layer", torch.zeros(4, heads, size, channels))
    keys.normal_(generator=torch.Generator().manual_seed(0))
    values.normal_(generator=torch.Generator().manual_seed(1))
    cache.advance(lengths)
    q, k, v = torch.randn(3, size, 6, heads, channels, generator=torch.Generator().manual_seed(2))
    found = form(cache, size, block_size=2, device=torch.device("cpu")).attend("layer", q, k, v)
    for row in range(6):
        length = lengths[row] if row < 4 else 0
        block = 2 if row < 4 else size  # rows beyond the samples see all of their block
        known = [
            torch.cat((store[row, :, :length], new[:, row].transpose(0, 1)), dim=1)
            if row < 4
            else new[:, row].transpose(0, 1)
            for store, new in ((keys, k), (values, v))
        ]
        scores = q[:, row].transpose(0, 1) @ known[0].transpose(1, 2) / channels**0.5
        hidden = torch.arange(length + size) // block > (length + torch.arange(size))[:, None] // block
        product = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ known[1]
        torch.testing.assert_close(found[:, row], product.transpose(0, 1).flatten(1))


def test_a_cache_keeps_rows_in_place_and_gives_their_places_to_others():
    cache = KeyValueCache()
    cache.add(4, 8)
    keys, _ = cache.of_layer("layer", torch.zeros(4, 1, 1, 1))
    cache.advance([2, 4, 6, 8])
    keys[:] = torch.arange(4.0)[:, None, None, None]
    cache.keep([1, 3])
    kept, _ = cache.of_layer("layer", torch.zeros(2, 1, 1, 1))
    assert cache.lengths == [4, 8] and kept.data_ptr() == keys.data_ptr() and len(kept) == 2
    assert kept[0, 0, :4].eq(1).all() and kept[1].eq(3).all()
    cache.add(2, 8)
    cache.advance([0, 0, 1, 2])
    more, _ = cache.of_layer("layer", torch.zeros(4, 1, 1, 1))
    more[2:, :, :2] = torch.tensor([7.0, 9.0])[:, None, None, None]
    cache.arrange([2, 3, 0, 1])
    assert (more.data_ptr(), cache.lengths, cache.allocations) == (keys.data_ptr(), [1, 2, 4, 8], 1)
    expected = ((7.0, 1), (9.0, 2), (1.0, 4), (3.0, 8))
    assert all(row[0, :length].eq(value).all() for row, (value, length) in zip(more, expected, strict=True))
    cache.add(1, 12)  # more than there is room for
    grown, _ = cache.of_layer("layer", torch.zeros(5, 1, 1, 1))
    assert grown.shape == (5, 1, 12, 1) and cache.allocations == 2 and torch.equal(grown[:4, :, :8], more)


def test_prompts_are_packed_in_order_up_to_a_limit():
    assert list(packs([3, 0, 4, 9, 1, 1], limit=8)) == [[0, 2], [3], [4, 5]]
    assert list(packs([])) == list(packs([0, 0])) == []


def test_a_stream_is_the_same_text_in_pieces_and_previews_change_nothing(model):
    members = [1, 5, 6]
    whole = run(model, members, max_new_tokens=16)
    prompts, ids = [PROMPTS[i] for i in members], [IDS[i] for i in members]
    events = list(model.stream(prompts, ids, steps=4, max_new_tokens=16, preview_steps=[1, 3]))
    assert sum(isinstance(event, Preview) for event in events) == 3 * 4 * 2
    for index, expected in enumerate(whole):
        own = [event for event in events if event.sample == index]
        pieces = [event for event in own if isinstance(event, Piece)]
        assert "".join(piece.text for piece in pieces) == expected.text
        assert [token for piece in pieces for token in piece.token_ids] == expected.token_ids.tolist()
        assert [piece.finish_reason for piece in pieces] == [None, None, None, "length"]
        assert [event.step for event in own if isinstance(event, Preview)] == [1, 3] * 4
        assert [type(event) for event in own] == [Preview, Preview, Piece] * 4
    # A stream that is not read to its end does no work for the rest of it.
    assert isinstance(next(model.stream(prompts, ids, steps=4, max_new_tokens=10_000)), Piece)


def test_modulations_are_computed_once_for_all_runs_of_one_grid(model, monkeypatch):
    run(model, [0], steps=4)  # another grid than the next one
    calls = []
    modulations = model.dit.modulations
    monkeypatch.setattr(model.dit, "modulations", lambda times: calls.append(len(times)) or modulations(times))
    run(model, [1, 2, 5], steps=6)
    run(model, [3], steps=6)
    assert calls == [7]


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, 2 * 3 * 4),
        ({"guidance_scale": 1.0}, 3 * 4),
        ({"guidance_interval": (0.4, 0.8)}, 3 * 4 + 3 * 2),  # t = 1, 0.75, 0.5, 0.25: two of them inside
    ],
)
def test_only_guided_evaluations_have_unconditional_rows(model, monkeypatch, options, rows):
    seen = []
    velocity = prior.BlockPrior._velocity

    def counted(self, z_SRC, row, *rest):
        if row != self.grid.clean_row:
            seen.append(z_SRC.shape[1])
        return velocity(self, z_SRC, row, *rest)

    monkeypatch.setattr(prior.BlockPrior, "_velocity", counted)
    run(model, [4, 5, 6], max_new_tokens=4, **options)
    assert sum(seen) == rows
    seen.clear()
    run(model, [0, 1, 5], max_new_tokens=4)  # two samples have no context to leave out
    assert sum(seen) == 4 * (3 + 1)


def test_sessions_answer_in_requests_indices(model):
    settings = generate.FlowSettings(steps=2, max_new_tokens=8)
    requests = [Request(list(range(100, 100 + 4 * n)), n, 4 * n) for n in (3, 1, 2)]
    session = model._flow.start(requests, settings, 0)
    seen = []
    while session.running:
        seen.append([(block.sample, block.last) for block in session.advance()])
    assert seen == [[(1, True), (2, False), (0, False)], [(2, True), (0, False)], [(0, True)]]


def test_settings_of_generation_are_named_in_one_line(model):
    for options, message in (
        ({"step": 3}, "step is no setting of generation; there are max_new_tokens"),
        ({"solver": "rk4"}, "solver=rk4 must be one of euler"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"stop": ["a", ""]}, "must be texts that are not empty"),
        ({"guidance_interval": (0.5, 0.2)}, "guidance_interval=0.5,0.2 must be low,high"),
        ({"guidance_interval": 0.5}, "guidance_interval=0.5 must be two numbers"),
        ({"first_block": "repaint"}, "first_block=repaint must be one of clean_condition"),
        ({"repaint_rounds": 2}, "need first_block=partial_repaint"),
        ({"first_block": "partial_repaint", "repaint_until": 1.5}, "repaint_until=1.5 must lie in 0 .. 1"),
        ({"max_new_tokens": [4]}, "2 prompts but 1 numbers in max_new_tokens"),
        ({"max_new_tokens": [4, 0]}, "max_new_tokens=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            model.generate(["the", "a"], **options)
    with pytest.raises(ValueError, match="cuda_graphs=True needs a GPU"):
        ColaDLM.from_published(FOLDER, device="cpu", cuda_graphs=True)
