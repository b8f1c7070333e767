"""Likelihoods and reconstruction curves of whole models."""

import math
from pathlib import Path

import pytest
import torch
from torch.distributions import Normal

from cola_megatron.config import ColaModelConfig
from cola_megatron.errors import UserError
from cola_megatron.evaluation.likelihood import from_all_replicas, own_part
from cola_megatron.inference.block_flow import BlockFlow
from cola_megatron.inference.flow_density import flow_log_density
from cola_megatron.inference.likelihood import stream
from cola_megatron.inference.likelihood_terms import Likelihood
from cola_megatron.interface import ColaDLM
from cola_megatron.models.dit import DiT
from cola_megatron.models.text_vae import TextVAE
from cola_megatron.parallel import gather_state_dict, initialize_parallel, initialize_parameters
from tests.ranks import run_ranks
from tests.support import perturbed

TOKENIZER = Path(__file__).parent / "data" / "reference_tiny" / "tokenizer.json"
IDS = list(range(100, 116))
QUICK = {"steps": 3, "samples": 2}
CLOSE = {"rel": 2e-5, "abs": 2e-3}


def random_model(tokenizer: Path | None = None, **vae: object) -> ColaDLM:
    """A model with weights away from their start: vocabulary 320, 4 channels, blocks of 4 in the prior."""
    sizes = {"hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4, "latent_dim": 4}
    layers = {"encoder_layers": 1, "decoder_layers": 1}
    prior = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8, "rotary_dim": 6}
    config = ColaModelConfig(
        vocab_size=320, vae={**sizes, **layers, **vae}, dit={**prior, "latent_dim": 4, "block_size": 4}
    )
    groups, weights = initialize_parallel(), {}
    for name, network in (("vae", TextVAE(320, config.vae, groups)), ("dit", DiT(config.dit, groups))):
        initialize_parameters(network, 0, groups)
        state = gather_state_dict(perturbed(network, std=0.15), groups)
        weights |= {f"{name}.{key}": tensor.detach() for key, tensor in state.items()}
    return ColaDLM(config, weights, tokenizer, device="cpu")


@pytest.fixture(scope="module")
def model() -> ColaDLM:
    return random_model(TOKENIZER, block_size=4, shifting_factor=0.1, scaling_factor=1.25)


def posterior_sample(model: ColaDLM, ids: list[int], sample_id: int, draw: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the estimate draws for a text: latents in the prior's coordinates, and log q of them."""
    vae = model.config.vae
    mean, logvar = (x.double() for x in model.encode(ids))  # a width of exp(-15) is lost in float32
    noise = torch.from_numpy(stream(66, "posterior", sample_id, draw).standard_normal(mean.shape, "float32"))
    width = (0.5 * logvar).exp() * vae.scaling_factor
    mean = (mean - vae.shifting_factor) * vae.scaling_factor
    y = mean + width * noise
    return y.float(), Normal(mean, width).log_prob(y).sum()


def assert_same(found: Likelihood, expected: Likelihood) -> None:
    for name in ("reconstruction_K", "prior_K", "posterior_K"):
        assert getattr(found, name).tolist() == pytest.approx(getattr(expected, name).tolist(), **CLOSE)


# ---- the terms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_size", [1, 2])
def test_each_term_is_what_the_parts_of_the_model_say(patch_size, model):
    """Posterior and reconstruction from `encode` and `decode`; the prior from `velocity` by differences."""
    if patch_size == 2:
        model = random_model(patch_size=2, shifting_factor=-0.2, scaling_factor=0.5)
    (found,) = model.log_likelihood([IDS], ids=[7], steps=1, samples=2, solver="euler", divergence="exact")
    for draw in range(2):
        y, log_q = posterior_sample(model, IDS, 7, draw)
        logits = model.decode(y, [len(y)])
        expected = torch.log_softmax(logits.double(), -1)[range(16), IDS].sum()
        assert found.posterior_K[draw].item() == pytest.approx(log_q.item(), **CLOSE)
        assert found.reconstruction_K[draw].item() == pytest.approx(expected.item(), **CLOSE)
        # One Euler step: z1 = y + v(y, 0), and the trace of dv/dy by central differences.
        velocity, divergence, width = model.velocity(y[None], y[None], torch.zeros(1))[0], 0.0, 0.02
        for coordinate in range(4 * y.shape[1]):
            nudge = torch.zeros_like(y).view(-1, 4 * y.shape[1])
            nudge[:, coordinate] = width
            ahead, behind = (
                model.velocity(y[None], (y + sign * nudge.view_as(y))[None], torch.zeros(1))[0] for sign in (1, -1)
            )
            divergence += ((ahead - behind).view_as(nudge)[:, coordinate] / (2 * width)).sum().item()
        expected = Normal(0.0, 1.0).log_prob(y + velocity).sum().item() + divergence
        assert found.prior_K[draw].item() == pytest.approx(expected, abs=0.01)
    assert found.elbo == pytest.approx(found.reconstruction + found.prior - found.posterior)
    assert found.elbo <= found.iwae
    assert (found.tokens, found.joint.prior_KN.shape) == (16, (2, len(y) // 4))


def test_the_flow_of_all_blocks_is_the_two_copy_pass(model):
    clean, noisy = torch.randn(2, 3, 12, 4, generator=torch.Generator().manual_seed(0))
    flow = BlockFlow(model.dit, clean.transpose(0, 1))
    for time in (0.0, 0.4):
        found = flow(flow.in_blocks(noisy.transpose(0, 1)), time)
        expected = model.velocity(clean, noisy, torch.full((3,), time))
        torch.testing.assert_close(found.view_as(expected), expected, rtol=1e-4, atol=1e-4)


def test_a_later_block_changes_nothing_in_the_blocks_before(model):
    other = [*IDS[:12], 7, 8, 9, 10]
    ours, theirs = (model.log_likelihood([ids], ids=[0], **QUICK)[0].joint for ids in (IDS, other))
    torch.testing.assert_close(ours.prior_KN[:, :3], theirs.prior_KN[:, :3], rtol=1e-5, atol=1e-3)
    assert ((ours.prior_KN - theirs.prior_KN)[:, 3].abs() > 0.01).all()


def test_probes_agree_with_the_exact_divergence_of_the_network(model):
    rows = 64
    y, _ = posterior_sample(model, IDS[:8], 0, 0)
    flow = BlockFlow(model.dit, y[:, None].expand(-1, rows, -1).contiguous())
    z_RND = flow.in_blocks(y[:, None].expand(-1, rows, -1))
    probes = torch.randn(z_RND.shape, generator=torch.Generator().manual_seed(1)).sign()
    found = flow_log_density(flow, z_RND, "euler", 3, probes)
    exact = flow_log_density(flow, z_RND, "euler", 3, None)[0]
    assert ((found.mean(0) - exact).abs() < 4 * found.std(0) / math.sqrt(rows)).all()


@pytest.mark.parametrize("options", [{"probe": "gaussian"}, {"noise_seed": 5}, {"solver": "heun"}, {"steps": 5}])
def test_no_option_is_idle(model, options):
    ours, theirs = (model.log_likelihood([IDS], **QUICK | other)[0] for other in ({}, options))
    assert abs(ours.prior - theirs.prior) > 1e-3
    assert len(theirs.prior_K) == 2


# ---- batches, padding, contexts -------------------------------------------------------------------------------------


def test_a_text_does_not_depend_on_its_neighbours(model):
    texts = ["the prior carries meaning", IDS, "noise", [5], "the decoder writes words . a block"]
    ids = [3, -7, 2**40, 0, 11]
    alone = [model.log_likelihood([text], ids=[number], **QUICK)[0] for text, number in zip(texts, ids, strict=True)]
    for batch_size in (1, 3, 100):
        for found, expected in zip(
            model.log_likelihood(texts, ids=ids, batch_size=batch_size, **QUICK), alone, strict=True
        ):
            assert_same(found, expected)


def test_padding_counts_in_the_latents_and_not_in_the_tokens(model):
    short, padded = IDS[:5], [*IDS[:5], 9, 9, 9]
    ours, theirs = (model.log_likelihood([ids], ids=[0], padding_id=9, **QUICK)[0] for ids in (short, padded))
    assert ours.tokens == 5 and theirs.tokens == 8
    assert ours.prior_K.tolist() == pytest.approx(theirs.prior_K.tolist(), **CLOSE)
    assert ours.posterior_K.tolist() == pytest.approx(theirs.posterior_K.tolist(), **CLOSE)
    y, _ = posterior_sample(model, padded, 0, 1)
    logits = model.decode(y, [8])[:5]
    expected = torch.log_softmax(logits.double(), -1)[range(5), short].sum().item()
    assert ours.reconstruction_K[1].item() == pytest.approx(expected, **CLOSE)


def test_a_conditional_estimate_is_joint_minus_context_with_the_same_draws(model):
    context, text = IDS[:8], IDS[8:14]
    (found,) = model.log_likelihood([text], [context], ids=[4], **QUICK)
    joint, alone = (model.log_likelihood([ids], ids=[4], **QUICK)[0] for ids in (IDS[:14], context))
    assert found.tokens == 6
    assert_same(found, Likelihood(joint.joint, alone.joint, 6, None, None))
    assert found.iwae == pytest.approx(joint.iwae - alone.iwae, **CLOSE)
    # The context fills its blocks, so what it has in common with the joint text cancels.
    torch.testing.assert_close(found.joint.prior_KN[:, :2], found.context.prior_KN, rtol=1e-5, atol=1e-3)


def test_a_text_after_a_context_has_the_tokens_of_the_joint_text(model):
    encode = lambda text: model.tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    (found,) = model.log_likelihood([" carries"], ["the prior"], **QUICK)
    assert found.tokens == len(encode("the prior carries")) - len(encode("the prior"))
    assert (found.text_bytes, found.text_words) == (8, 1)
    (without,) = model.log_likelihood(["noise"], [""], **QUICK)
    assert without.context is None


def test_what_is_refused(model):
    for arguments, message in (
        ({"texts": [[]]}, r"texts\[0\] has no tokens"),
        ({"texts": [[5]], "contexts": []}, "1 texts but 0 contexts"),
        ({"texts": [[5, 320]]}, r"texts\[0\]: token id 320 must lie in 0 .. 319"),
        ({"texts": [[5]], "ids": [1, 2]}, "1 texts but 2 ids"),
        ({"texts": [[5]], "batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"texts": [[5]], "guidance_scale": 2.0}, "guidance_scale is no setting of a likelihood; there are samples"),
        ({"texts": [[5]], "padding_id": 320}, "padding_id=320 must lie in 0 .. 319"),
    ):
        with pytest.raises(ValueError, match=message):
            model.log_likelihood(**arguments)
    with pytest.raises(ValueError, match=r"t=1.5 must lie in 0 .. 1"):
        model.reconstruction_curve([[5]], [0.0, 1.5])


def test_models_without_a_density_a_prior_or_a_tokenizer():
    with pytest.raises(UserError, match="encoder is deterministic"):
        random_model(variational=False).log_likelihood([[5] * 4])
    bare = random_model()
    assert bare.log_likelihood([[5] * 4], **QUICK)[0].text_bytes is None
    with pytest.raises(ValueError, match="texts that are no multiple of 4 tokens need a padding_id"):
        bare.log_likelihood([[5] * 3])
    with pytest.raises(ValueError, match=r"without a tokenizer\.json: give token ids"):
        bare.log_likelihood(["text"])
    bare.dit = None
    with pytest.raises(UserError, match="this model has no prior"):
        bare.log_likelihood([[5] * 4])
    assert len(bare.reconstruction_curve([[5] * 4], [0.0]).accuracy) == 1


def test_blocks_of_encoder_and_prior_that_do_not_divide_each_other():
    (found,) = random_model(block_size=6).log_likelihood([[5] * 11], padding_id=3, **QUICK)
    assert found.joint.prior_KN.shape == (2, 3)  # 12 latents


def test_bfloat16_is_near(model):
    weights = {
        f"{part}.{name}": tensor
        for part in ("vae", "dit")
        for name, tensor in gather_state_dict(getattr(model, part), model.groups).items()
    }
    half = ColaDLM(model.config, weights, None, device="cpu", dtype=torch.bfloat16)
    ours, theirs = (one.log_likelihood([IDS], **QUICK)[0] for one in (half, model))
    assert ours.prior == pytest.approx(theirs.prior, rel=0.05)


# ---- processes ------------------------------------------------------------------------------------------------------


def in_parallel(folder: Path, tensor_parallel_size: int) -> list[list[list[float]]]:
    model = ColaDLM.from_published(folder, device="cpu", tensor_parallel_size=tensor_parallel_size)
    results = model.log_likelihood([IDS[8:], IDS[:7]], [IDS[:8], []], **QUICK)
    curve = model.reconstruction_curve([IDS, IDS[:7]], [0.0, 0.5])
    terms = [[getattr(r, f"{name}_K").tolist() for name in ("reconstruction", "prior", "posterior")] for r in results]
    return [*terms, curve.correct_MT.tolist(), curve.nll_MT.tolist()]


def test_tensor_parallel_processes_have_the_answers_of_one(model, tmp_path):
    model.save_published(tmp_path)
    expected = in_parallel(tmp_path, 1)
    for found in run_ranks(in_parallel, 2, tmp_path, 2):
        for ours, theirs in zip(found, expected, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert one == pytest.approx(other, rel=1e-5, abs=1e-3)


def shared_out(count: int) -> list[int]:
    groups = initialize_parallel()
    return from_all_replicas([10 * item for item in own_part(range(count), groups)], groups)


def test_replicas_share_texts_out_and_put_them_in_order():
    for count in (1, 4, 5):
        assert run_ranks(shared_out, 2, count) == [[10 * item for item in range(count)]] * 2


# ---- reconstruction over t ------------------------------------------------------------------------------------------


def test_the_curve_begins_at_the_posterior_mean(model):
    texts = [IDS, IDS[:7]]
    curve = model.reconstruction_curve(texts, [0.0, 0.3, 1.0], padding_id=9, batch_size=1)
    for row, ids in enumerate([IDS, [*IDS[:7], 9]]):
        mean, _ = model.encode(ids)
        logits = model.decode(model.vae.to_prior(mean), [len(mean)])[: len(texts[row])].double()
        nll = -torch.log_softmax(logits, -1)[range(len(texts[row])), texts[row]]
        assert curve.nll_MT[row, 0].item() == pytest.approx(nll.sum().item(), **CLOSE)
        assert curve.correct_MT[row, 0].item() == (logits.argmax(-1) == torch.tensor(texts[row])).sum().item()
    assert curve.tokens_M.tolist() == [16, 7]
    together = model.reconstruction_curve(texts, [0.0, 0.3, 1.0], padding_id=9)
    torch.testing.assert_close(together.nll_MT, curve.nll_MT, rtol=1e-5, atol=1e-3)
    # At t = 1 nothing of the text is left: another one is read the same.
    noise = model.decode(torch.from_numpy(stream(66, "robustness", 0, 0).standard_normal((16, 4), "float32")), [16])
    assert curve.correct_MT[0, 2].item() == (noise.argmax(-1) == torch.tensor(IDS)).sum().item()
