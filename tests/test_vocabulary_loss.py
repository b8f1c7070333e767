"""Head and cross-entropy in chunks: the loss and the gradients of all logits at once."""

import pytest
import torch

from cola_megatron.config import RunConfig
from cola_megatron.config.parametrization import ParametrizationConfig
from cola_megatron.families.cola.chain import Cola
from cola_megatron.layers.embedding import VocabularyHead, token_cross_entropy
from cola_megatron.layers.initializers import normal
from cola_megatron.layers.roles import Roles
from cola_megatron.parallel import initialize_parallel, initialize_parameters
from tests.ranks import run_ranks
from tests.support import perturbed, random_batch

LENGTH, BATCH, WIDTH = 11, 3, 24


def head_of(vocab_size: int, bias: bool, dtype: torch.dtype, ranks: int = 1) -> VocabularyHead:
    groups = initialize_parallel(tensor_parallel_size=ranks)
    role = Roles(ParametrizationConfig(), WIDTH, depth=1).readout
    head = VocabularyHead(WIDTH, vocab_size, groups=groups, bias=bias, initializer=normal(0.5), role=role)
    initialize_parameters(head, 0, groups)
    return perturbed(head).to(dtype)


def inputs(vocab_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    x_SBH = torch.randn(LENGTH, BATCH, WIDTH, generator=random).to(dtype).requires_grad_()
    targets_SB = torch.randint(0, vocab_size, (LENGTH, BATCH), generator=random)
    targets_SB[0, 0], targets_SB[0, 1] = 0, vocab_size - 1
    weights_SB = torch.rand(LENGTH, BATCH, generator=random)
    weights_SB[3] = 0.0
    return x_SBH, targets_SB, weights_SB


def with_gradients(loss: torch.Tensor, x: torch.Tensor, head: VocabularyHead) -> list[torch.Tensor]:
    return [loss, *torch.autograd.grad(0.7 * loss, [x, *head.parameters()])]


def compare(vocab_size: int, chunk: int, bias: bool, dtype: torch.dtype, tolerance: float, ranks: int = 1) -> None:
    head = head_of(vocab_size, bias, dtype, ranks)
    x, targets, weights = inputs(vocab_size, dtype)
    whole = (token_cross_entropy(head(x), targets) * weights).sum()
    chunked = head.weighted_nll(x, targets, weights, chunk)
    names = ["loss", "hidden", *(name for name, _ in head.named_parameters())]
    found, expected = with_gradients(chunked, x, head), with_gradients(whole, x, head)
    for name, ours, theirs in zip(names, found, expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert error <= tolerance, (name, error)


# In float64 the sums differ in their order alone; bfloat16 rounds a gradient of the logits and a product of it once
# each, 2^-8 / sqrt(3) in the root mean square, in either form.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2 * 2**-8)])
@pytest.mark.parametrize("chunk", [1, 8, 33, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_gradients_are_those_of_all_logits(dtype, tolerance, chunk, bias):
    compare(37, chunk, bias, dtype, tolerance)


@pytest.mark.parametrize("vocab_size", [40, 37])  # 37 is padded to 38 on two ranks
def test_a_vocabulary_cut_over_ranks(vocab_size):
    run_ranks(compare_on_two_ranks, 2, vocab_size)


def compare_on_two_ranks(vocab_size: int) -> None:
    compare(vocab_size, 8, True, torch.float32, 2e-6, ranks=2)


def test_without_gradients_there_is_the_loss_alone():
    head = head_of(37, True, torch.float32).requires_grad_(False)
    x, targets, weights = inputs(37, torch.float32)
    with torch.no_grad():
        loss = head.weighted_nll(x, targets, weights, 8)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx((token_cross_entropy(head(x), targets) * weights).sum().item(), rel=1e-6)


@pytest.mark.parametrize("overrides", [[], ["objective.vae.mask_weight=0"], ["model.vae.patch_size=2"]])
def test_a_training_pass_has_the_same_terms_and_gradients(tiny, overrides):
    def terms_and_gradients(config: RunConfig) -> tuple[dict[str, torch.Tensor], list[torch.Tensor | None]]:
        groups = initialize_parallel()
        model = Cola(config, groups)
        initialize_parameters(model, config.seed, groups)
        batch = random_batch(config, range(3))
        batch["counted"][:2, 20:] = False
        terms = perturbed(model)(batch, train_vae=True)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return terms, list(torch.autograd.grad(terms["loss"], trained, allow_unused=True))

    options = ["training.vae_update.from_scratch=true", *overrides]
    expected, expected_gradients = terms_and_gradients(tiny(2, *options))
    found, found_gradients = terms_and_gradients(tiny(2, *options, "training.loss_chunk_tokens=40"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-5), name
    for ours, theirs in zip(found_gradients, expected_gradients, strict=True):
        assert theirs is None or (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_gradients_are_given_once():
    head = head_of(37, True, torch.float32)
    x, targets, weights = inputs(37, torch.float32)
    loss = head.weighted_nll(x, targets, weights, 8)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run its forward again"):
        loss.backward()


def test_what_scales_the_loss_is_not_rounded_to_bfloat16():
    head = head_of(37, True, torch.bfloat16)
    x, targets, weights = inputs(37, torch.bfloat16)
    ones, thirds = (
        torch.autograd.grad(factor * head.weighted_nll(x, targets, weights, 8), [x, *head.parameters()])
        for factor in (1.0, 1 / 3)
    )
    for one, third in zip(ones, thirds, strict=True):
        assert torch.equal(third, (one.float() * torch.tensor(1 / 3)).bfloat16())
