"""The four ways to begin after a prompt that ends inside a block."""

from pathlib import Path

import pytest
import torch

from cola_megatron.inference.first_block import FirstBlock, lay_out
from cola_megatron.inference.prior import BlockPrior, TimeGrid
from cola_megatron.inference.protocol import Request
from cola_megatron.inference.settings import FlowSettings
from cola_megatron.interface import ColaDLM

FOLDER = Path(__file__).parent / "data" / "reference_tiny"  # blocks of 4 latents, a token each
PADDING = 2


@pytest.fixture(scope="module")
def model() -> ColaDLM:
    return ColaDLM.from_published(FOLDER, device="cpu")


@pytest.mark.parametrize(
    ("strategy", "prompt", "expected"),
    [
        ("clean_condition", [5] * 6, ([5] * 6 + [0] * 2, 4, 2, 2)),
        ("partial_repaint", [5] * 6, ([5] * 6 + [0] * 2, 4, 2, 2)),
        ("left_pad", [5] * 6, ([0] * 2 + [5] * 6, 8, 0, 0)),
        ("right_pad", [5] * 6, ([5] * 6 + [0] * 2, 8, 0, 0)),
        *((strategy, [5] * 8, ([5] * 8, 8, 0, 0)) for strategy in ("clean_condition", "left_pad", "right_pad")),
        ("clean_condition", [], ([], 0, 0, 0)),
    ],
)
def test_a_prompt_is_laid_out(strategy, prompt, expected):
    layout = lay_out(prompt, strategy, block_size=4, patch_size=1, encoder_unit=4, padding_id=0)
    assert (layout.token_ids, layout.whole, layout.held, layout.repeated_tokens) == expected


def test_the_encoder_gets_no_more_padding_than_it_needs():
    layout = lay_out([5] * 7, "clean_condition", block_size=4, patch_size=2, encoder_unit=2, padding_id=0)
    assert (layout.token_ids, layout.whole, layout.held, layout.repeated_tokens) == ([5] * 7 + [0], 4, 0, 0)
    layout = lay_out([5] * 9, "clean_condition", block_size=4, patch_size=2, encoder_unit=2, padding_id=0)
    # Five latents, the last of them half padding: one is held, and it repeats one token of the prompt.
    assert (layout.token_ids, layout.whole, layout.held, layout.repeated_tokens) == ([5] * 9 + [0], 4, 1, 1)


def first_block(repaint: bool, until: float = 0.0, rounds: int = 1) -> tuple[FirstBlock, torch.Tensor]:
    held = torch.tensor([[True, False], [False, False]])
    clean, noise, z = torch.randn(3, 2, 2, 5, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    return FirstBlock(held, clean, noise, generators, repaint, until, rounds), z


def test_the_clean_condition_holds_the_prompt_at_time_zero():
    first, z = first_block(repaint=False)
    for time in (1.0, 0.3, 0.0):
        held = first.hold(z, time)
        assert torch.equal(held[0, 0], first.clean_SBC[0, 0]) and torch.equal(held[1], z[1])
        assert torch.equal(held[0, 1], z[0, 1]) and first.rounds(time) == 1
    assert first.time_rows(3, clean_row=9).tolist() == [[9, 3], [3, 3]]


def test_partial_repaint_puts_the_prompt_on_its_path_and_then_lets_go():
    first, z = first_block(repaint=True, until=0.4, rounds=3)
    held = first.hold(z, 0.5)
    torch.testing.assert_close(held[0, 0], (first.clean_SBC + first.noise_SBC)[0, 0] / 2)
    assert torch.equal(held[1], z[1]) and torch.equal(held[:, 1], z[:, 1])
    assert torch.equal(first.hold(z, 0.4), z) and torch.equal(first.hold(z, 0.0), z)
    assert (first.rounds(0.5), first.rounds(0.4)) == (3, 1)
    assert first.time_rows(3, clean_row=9) is None
    whole, _ = first_block(repaint=True)
    assert torch.equal(whole.hold(z, 0.0)[0, 0], whole.clean_SBC[0, 0])


def test_noising_back_keeps_the_marginals_of_the_path():
    """From t = 0.5 to s = 0.75: clean data z0 keeps the weight 1 - s, and the noise's variance becomes s^2."""
    held = torch.tensor([[True, False]])
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    clean = torch.full((1, 2, 200_000), 3.0)
    first = FirstBlock(held, clean, torch.zeros_like(clean), generators, repaint=True)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    before = torch.full_like(clean, 7.0)
    back = first.noise_back(0.5 * clean + 0.5 * noise, before, time=0.5, earlier=0.75)
    assert back[0, 0].mean().item() == pytest.approx(0.25 * 3, abs=0.01)
    assert back[0, 0].std().item() == pytest.approx(0.75, abs=0.01)
    assert torch.equal(back[0, 1], before[0, 1])  # this sample holds nothing: it stays where it was
    assert first.noise_back(clean, before, time=0.5, earlier=1.0)[0, 0].std().item() == pytest.approx(1.0, abs=0.01)


def generated(model: ColaDLM, prompt: list[int], **options):
    options = {"steps": 4, "max_new_tokens": 8, "padding_id": PADDING} | options
    return model.generate([prompt], **options)[0]


def test_padding_is_a_prompt_of_whole_blocks(model):
    prompt = list(range(100, 106))
    for strategy, padded in (("left_pad", [PADDING] * 2 + prompt), ("right_pad", prompt + [PADDING] * 2)):
        found, same = generated(model, prompt, first_block=strategy), generated(model, padded)
        assert torch.equal(found.latents, same.latents) and found.prompt_tokens == 0
        assert torch.equal(found.token_ids, same.token_ids)


def test_the_clean_condition_leaves_the_prompt_s_latents_in_the_block(model):
    prompt = list(range(100, 106))
    known = model.vae.to_prior(model.encode([*prompt, PADDING, PADDING])[0])
    for strategy in ("clean_condition", "partial_repaint"):
        found = generated(model, prompt, first_block=strategy)
        torch.testing.assert_close(found.latents[0, :2], known[4:6], rtol=0, atol=1e-5)
        assert found.prompt_tokens == 2
    free = generated(model, prompt, first_block="partial_repaint", repaint_until=0.5)
    assert (free.latents[0, :2] - known[4:6]).abs().max() > 0.1


@torch.no_grad()
def test_where_the_repaint_ends_the_block_goes_on_from_there(model):
    """Grid 1, 0.75, 0.5, 0.25, 0 with the prompt put back above 0.5: the last time at 0.75."""
    settings = FlowSettings(steps=4, first_block="partial_repaint", repaint_until=0.5)
    prior = BlockPrior(model.dit, TimeGrid(model.dit, 4), settings)
    prior.admit([torch.zeros(0, 8)], 8)
    noise, clean = torch.randn(2, 4, 1, 8, generator=torch.Generator().manual_seed(0))
    held = torch.tensor([True, True, False, False])[:, None]
    first = FirstBlock(held, clean, noise, [torch.Generator()], repaint=True, repaint_until=0.5)
    seen = list(prior.draw(noise, first))
    torch.testing.assert_close(seen[1].z[:2], 0.25 * clean[:2] + 0.75 * noise[:2])
    torch.testing.assert_close(seen[2].z, seen[1].z - 0.25 * seen[1].velocity)
    torch.testing.assert_close(seen[3].z, seen[2].z - 0.25 * seen[2].velocity)


def test_previews_keep_the_prompt(model):
    prompt = list(range(100, 106))
    for strategy in ("clean_condition", "partial_repaint"):
        events = model.stream([prompt], steps=4, max_new_tokens=4, first_block=strategy, preview_steps=[0], ids=[1])
        assert next(events).step == 0
    session = model._flow.start([Request(prompt, 0)], FlowSettings(steps=4, max_new_tokens=4), PADDING)
    preview, block = session.advance([3])
    assert preview.token_ids[:2] == block.token_ids[:2] and preview.repeated == block.repeated == 2


def test_partial_repaint_is_another_distribution_and_rounds_cost_evaluations(model, monkeypatch):
    prompt, evaluations = list(range(100, 106)), []
    velocity = BlockPrior._evaluate
    monkeypatch.setattr(
        BlockPrior, "_evaluate", lambda self, z, step, *rest: evaluations.append(step) or velocity(self, z, step, *rest)
    )
    outputs = {}
    for rounds in (1, 3):
        evaluations.clear()
        options = {"first_block": "partial_repaint", "repaint_until": 0.3, "repaint_rounds": rounds}
        outputs[rounds] = generated(model, prompt, max_new_tokens=4, **options)
        assert evaluations == [step for step in range(4) for _ in range(rounds if step < 3 else 1)]  # 1, .75, .5, .25
    assert not torch.allclose(outputs[1].latents, outputs[3].latents)
    assert not torch.allclose(outputs[1].latents, generated(model, prompt, max_new_tokens=4).latents)
