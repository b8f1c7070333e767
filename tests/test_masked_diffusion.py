"""Masked diffusion in training: the loss as it is defined and the chain that runs, draws, masks and blocks."""

import numpy as np
import pytest
import torch

from cola_megatron.config.masked_diffusion import (
    MaskedDiffusionConfig,
    MaskedDiffusionModelConfig,
    MaskedDiffusionObjectiveConfig,
)
from cola_megatron.config.run import DataConfig
from cola_megatron.config.training import TrainingConfig
from cola_megatron.config.transformer import TransformerConfig
from cola_megatron.errors import UserError
from cola_megatron.families.masked_diffusion.chain import MaskedDiffusion
from cola_megatron.families.masked_diffusion.draws import sample_draws
from cola_megatron.families.masked_diffusion.loss import masked_diffusion_loss
from cola_megatron.objectives.masked_diffusion import (
    low_discrepancy,
    mask_in_order,
    masked_positions,
    masking_times,
    number_to_mask,
    subset_weights,
)
from cola_megatron.objectives.samples import positions
from cola_megatron.parallel import initialize_parallel, initialize_parameters
from tests.support import perturbed

LENGTH, VOCABULARY = 32, 60
NETWORK = TransformerConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_key_value_heads=2
)


def config_of(
    model: dict | None = None, objective: dict | None = None, training: dict | None = None, documents: bool = False
) -> MaskedDiffusionConfig:
    return MaskedDiffusionConfig(
        model=MaskedDiffusionModelConfig(vocab_size=VOCABULARY, transformer=NETWORK, **(model or {})),
        objective=MaskedDiffusionObjectiveConfig(**(objective or {})),
        training=TrainingConfig(precision="fp32", **(training or {})),
        data=DataConfig(sequence_length=LENGTH, document_attention=documents),
    )


def model_of(config: MaskedDiffusionConfig) -> MaskedDiffusion:
    groups = initialize_parallel()
    model = MaskedDiffusion(config, groups)
    initialize_parameters(model, config.seed, groups)
    return perturbed(model)


def batch_of(config: MaskedDiffusionConfig, samples: range = range(3), step: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens in documents of about ten, a padded end in the first sample, and what training would draw."""
    rows = []
    for index in samples:
        tokens = np.random.default_rng(index).integers(2, VOCABULARY, LENGTH)
        tokens[[9, 21]] = 0
        if index == 0:
            tokens[27:] = 1
        rows.append({**positions(tokens, padding_id=1, end_of_text_id=0), **sample_draws(config, index, step)})
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


def gradients(model: MaskedDiffusion, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, named.values()), strict=True))


# ---- definition and chain -------------------------------------------------------------------------------------------

MODES = {
    "LLaDA": {},
    "one block of the whole length": {"model": {"block_size": LENGTH}},
    "blocks": {"model": {"block_size": 8}},
    "blocks of one": {"model": {"block_size": 1}},
    "documents": {"documents": True},
    "blocks and documents": {"model": {"block_size": 8}, "documents": True},
    "many lengths": {"objective": {"random_length_share": 0.9}},
    "one length": {"objective": {"random_length_share": 0}},
    "documents of one length": {"objective": {"random_length_share": 0}, "documents": True},
    "blocks, documents, many lengths": {
        "model": {"block_size": 8},
        "objective": {"random_length_share": 0.9},
        "documents": True,
    },
    "a mask of the vocabulary": {"model": {"mask_token_id": 1}},
    "even times": {"objective": {"times": "low_discrepancy"}, "model": {"block_size": 4}},
    "recomputed": {"training": {"activation_checkpointing": True}},
}


@pytest.mark.parametrize("mode", MODES)
def test_the_chain_computes_the_definition(mode):
    config = config_of(**MODES[mode])
    model, batch = model_of(config), batch_of(config)
    if config.model.mask_token_id is not None:
        batch["tokens"] = torch.where(batch["tokens"] == 1, 2, batch["tokens"])
    in_chain, defined = model(batch), masked_diffusion_loss(model.transformer, batch, config)
    assert in_chain.keys() == defined.keys() == {"loss", "bound"}
    assert all(torch.equal(in_chain[term], defined[term]) for term in in_chain)
    expected, found = gradients(model, defined["loss"]), gradients(model, in_chain["loss"])
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert all(gradient.abs().sum() > 0 for gradient in found.values())


@pytest.mark.parametrize("mode", ["LLaDA", "blocks, documents, many lengths"])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_a_loss_in_chunks_is_the_same_up_to_the_order_of_its_sums(mode, chunk):
    config = config_of(**MODES[mode], training={"loss_chunk_tokens": chunk})
    model, batch = model_of(config), batch_of(config)
    in_chain, defined = model(batch), masked_diffusion_loss(model.transformer, batch, config)
    torch.testing.assert_close(in_chain["loss"], defined["loss"], rtol=1e-6, atol=0)
    expected, found = gradients(model, defined["loss"]), gradients(model, in_chain["loss"])
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_attention_over_two_copies_in_chunks_is_the_same():
    by_blocks = {"model": {"block_size": 4}}
    whole, chunked = config_of(**by_blocks), config_of(**by_blocks, training={"attention_chunk": 8})
    losses, found = [], []
    for config in (whole, chunked):
        model = model_of(config)
        losses.append(model(batch_of(config))["loss"])
        found.append(gradients(model, losses[-1]))
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="attention_chunk=8 is of attention over a clean and a noisy"):
        config_of(training={"attention_chunk": 8})


def test_one_block_of_the_whole_length_is_llada_bit_for_bit():
    whole, block = config_of(), config_of({"block_size": LENGTH})
    model, other = model_of(whole), model_of(block)
    batch = batch_of(whole)
    assert all(torch.equal(tensor, batch_of(block)[name]) for name, tensor in batch.items())
    one, two = model(batch), other(batch)
    assert torch.equal(one["loss"], two["loss"])
    of_other = gradients(other, two["loss"])
    assert all(torch.equal(gradient, of_other[name]) for name, gradient in gradients(model, one["loss"]).items())


def test_the_loss_of_llada_by_hand():
    """Cross-entropy of the masked tokens over their sample's t, over the tokens that count."""
    config = config_of(objective={"random_length_share": 0})
    model, batch = model_of(config), batch_of(config)
    total = 0.0
    for row, tokens_L in enumerate(batch["tokens"]):
        t, counted_L = batch["time"][row, 0], batch["counted"][row]
        masked_L = (batch["mask_uniform"][row] < t) & counted_L
        noisy_L = torch.where(masked_L, VOCABULARY, tokens_L)
        logits_LV = model.transformer(noisy_L[None], model.copies.mask(noisy_L.device))[:, 0]
        nll_L = torch.nn.functional.cross_entropy(logits_LV, tokens_L, reduction="none")
        total += (nll_L * masked_L / t).sum() / counted_L.sum() / len(batch["tokens"])
    torch.testing.assert_close(model(batch)["loss"], total.detach(), rtol=1e-5, atol=0)


# ---- who sees whom --------------------------------------------------------------------------------------------------


def test_padding_is_never_masked_and_never_counts():
    config = config_of(objective={"random_length_share": 0})
    model, batch = model_of(config), batch_of(config, range(1))
    assert not batch["counted"][0, 27:].any()
    assert not masked_positions(batch["mask_uniform"], torch.ones(1, 1), batch["counted"])[0, 27:].any()
    batch["mask_uniform"][:] = 0  # every token that may be is masked
    before = model(batch)["loss"]
    batch["mask_uniform"][0, 27:] = 1
    assert torch.equal(model(batch)["loss"], before)


@pytest.mark.parametrize("block_size", [None, 8])
def test_no_document_sees_another(block_size):
    config = config_of({"block_size": block_size}, {"random_length_share": 0}, documents=True)
    model, batch = model_of(config), batch_of(config, range(1))
    batch["mask_uniform"][0, :12] = 1  # nothing of the first document is asked for, and the token before it is
    before = model(batch)["loss"]
    batch["tokens"][0, :10] = 5
    assert torch.equal(model(batch)["loss"], before)
    batch["tokens"][0, 11] = 7
    assert not torch.equal(model(batch)["loss"], before)


@pytest.mark.parametrize("block_size", [None, 8])
def test_what_lies_beyond_the_length_of_a_sample_is_not_there(block_size):
    config = config_of({"block_size": block_size})
    model, batch = model_of(config), batch_of(config, range(1, 2))
    batch["length"][:] = 11
    before = model(batch)["loss"]
    batch["tokens"][0, 11:], batch["mask_uniform"][0, 11:], batch["counted"][0, 11:] = 9, 0, False
    assert torch.equal(model(batch)["loss"], before)
    batch["length"][:] = 12
    assert not torch.equal(model(batch)["loss"], before)


def test_a_block_sees_the_clean_blocks_before_it_and_no_later_one():
    config = config_of({"block_size": 8}, {"random_length_share": 0})
    model, batch = model_of(config), batch_of(config, range(1, 2))

    def loss_of(*blocks: int, changed: int | None = None) -> torch.Tensor:
        """With these blocks masked, and one token changed."""
        tokens_BL, uniform_BL = batch["tokens"].clone(), torch.ones(1, LENGTH)
        for block in blocks:
            uniform_BL[0, 8 * block : 8 * block + 8] = 0
        if changed is not None:
            tokens_BL[0, changed] = 9
        return model({**batch, "tokens": tokens_BL, "mask_uniform": uniform_BL})["loss"]

    assert torch.equal(loss_of(2), loss_of(2, changed=24))
    assert not torch.equal(loss_of(2), loss_of(2, changed=3))
    # That an earlier block is masked too changes nothing for a later one.
    torch.testing.assert_close(loss_of(0, 2), loss_of(0) + loss_of(2), rtol=1e-6, atol=0)


def test_a_text_that_holds_the_mask_of_the_vocabulary_is_refused():
    config = config_of({"mask_token_id": 7})
    model, batch = model_of(config), batch_of(config)
    with pytest.raises(UserError, match=r"token id 7, which is \[MASK\]"):
        model(batch)
    with pytest.raises(ValueError, match="mask_token_id=60 must be a token of the vocabulary"):
        config_of({"mask_token_id": VOCABULARY})


# ---- draws ----------------------------------------------------------------------------------------------------------


def test_times_are_uniform_above_the_floor_and_the_share_of_masked_tokens_follows():
    config = config_of(objective={"random_length_share": 0, "min_time": 0.25})
    draws = [sample_draws(config, index, 3) for index in range(2000)]
    times = np.array([draw["time"][0] for draw in draws])
    assert times.min() > 0.25 and times.max() <= 1
    assert np.histogram(times, bins=5, range=(0.25, 1))[0] == pytest.approx([400] * 5, rel=0.2)
    shares = np.array([(draw["mask_uniform"] < draw["time"]).mean() for draw in draws])
    assert (shares - times).mean() == pytest.approx(0, abs=4 * np.sqrt(0.25 / LENGTH / 2000))
    assert masking_times(np.array([0.0, 1 - 2**-53]), 1e-3).tolist() == [1.0, np.float32(1e-3)]


def test_draws_depend_on_the_seed_the_sample_and_the_step_alone():
    config = config_of({"block_size": 8})
    draws = [sample_draws(config, sample, step) for sample, step in ((5, 2), (5, 2), (6, 2), (5, 3))]
    assert draws[0]["time"].shape == (4,) and draws[0]["mask_uniform"].shape == (LENGTH,)
    for name in ("time", "mask_uniform"):
        assert (draws[0][name] == draws[1][name]).all()
        assert (draws[0][name] != draws[2][name]).any() and (draws[0][name] != draws[3][name]).any()


@pytest.mark.parametrize("block_size", [None, 8])
def test_times_of_low_discrepancy_are_spread_evenly_over_every_run_of_samples(block_size):
    config = config_of({"block_size": block_size}, {"times": "low_discrepancy", "min_time": 1e-6})
    for first, step in ((0, 0), (1000, 7), (12_345_678, 9)):
        times = np.concatenate([sample_draws(config, first + index, step)["time"] for index in range(64)])
        counts = np.histogram(times, bins=16, range=(0, 1))[0] / (len(times) / 16)
        assert counts.min() >= 0.5 and counts.max() <= 1.5  # independent ones would leave bins almost empty
    firsts = np.array([sample_draws(config, 0, step)["time"][0] for step in range(400)])
    assert firsts.mean() == pytest.approx(0.5, abs=4 * np.sqrt(1 / 12 / 400))


def test_low_discrepancy_is_exact_far_out():
    near, far = low_discrepancy(0.25, 3), low_discrepancy(0.25, 3 + 2**64)
    assert near == far and 0 <= near < 1


def test_few_samples_are_shorter():
    config = config_of(objective={"random_length_share": 0.1})
    lengths = np.array([sample_draws(config, index, 0)["length"][0] for index in range(3000)])
    cut = lengths[lengths < LENGTH]
    assert len(cut) == pytest.approx(300 * (LENGTH - 1) / LENGTH, rel=0.25)
    assert cut.min() == 1 and cut.mean() == pytest.approx(LENGTH / 2, rel=0.15)
    assert "length" not in sample_draws(config_of(objective={"random_length_share": 0}), 0, 0)


def test_masks_of_a_given_number():
    counted_BL = torch.tensor([[True] * 8, [True] * 5 + [False] * 3])
    order_BL = torch.tensor([[0.8, 0.1, 0.5, 0.3, 0.9, 0.2, 0.4, 0.6]] * 2)
    candidates_BN = counted_BL.unflatten(1, (2, 4)).sum(-1)
    number_BN = number_to_mask(torch.tensor([[0.0, 0.5], [0.999, 0.3]]), candidates_BN)
    assert number_BN.tolist() == [[1, 3], [4, 1]]
    masked_BL = mask_in_order(order_BL, counted_BL, number_BN)
    assert [row.nonzero()[:, 0].tolist() for row in masked_BL] == [[1, 5, 6, 7], [0, 1, 2, 3, 4]]
    assert subset_weights(masked_BL, counted_BL, 2).tolist() == [
        [0, 4, 0, 0, 0, 4 / 3, 4 / 3, 4 / 3],
        [1, 1, 1, 1, 1, 0, 0, 0],
    ]
    nothing = torch.zeros(2, 8, dtype=torch.bool)
    assert number_to_mask(torch.full((2, 2), 0.7), nothing.unflatten(1, (2, 4)).sum(-1)).tolist() == [[0, 0], [0, 0]]
    assert subset_weights(nothing, nothing, 2).sum() == 0


@pytest.mark.parametrize("tokens", [1, 3, 7])
def test_every_number_of_masked_tokens_is_as_likely(tokens):
    levels = torch.arange(7 * 60, dtype=torch.float64) / (7 * 60)
    numbers = number_to_mask(levels[None], torch.full((1, len(levels)), tokens))
    assert torch.bincount(numbers[0], minlength=tokens + 1).tolist() == [0, *[7 * 60 // tokens] * tokens]


# ---- config ---------------------------------------------------------------------------------------------------------


def test_a_block_that_does_not_divide_the_sequence_is_refused():
    with pytest.raises(ValueError, match=r"model\.block_size=7 must divide data\.sequence_length=32"):
        config_of({"block_size": 7})


def test_what_a_layout_must_divide():
    by_blocks = config_of({"block_size": 8})
    assert by_blocks.attention_lengths == (56,) and config_of().attention_lengths == (32,)
    assert list(by_blocks.shared_sequences.values()) == [56] and list(config_of().shared_sequences.values()) == [32]
    assert by_blocks.shared_widths["model.transformer.num_key_value_heads"] == 2
