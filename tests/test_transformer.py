"""The network that the baselines share: parameter counts, RMSNorm, grouped queries, tensor-parallel layouts."""

import numpy as np
import pytest
import torch

from cola_megatron.config.transformer import TransformerConfig
from cola_megatron.layers.attention import product
from cola_megatron.layers.embedding import token_cross_entropy
from cola_megatron.layers.masks import AttentionMask, block_causal_mask
from cola_megatron.layers.norms import RMSNorm
from cola_megatron.layers.roles import FIXED
from cola_megatron.models.transformer import Transformer
from cola_megatron.parallel import gather_state_dict, initialize_parallel, initialize_parameters, sum_partial_gradients
from tests.ranks import run_ranks

CPU = torch.device("cpu")
CAUSAL = AttentionMask(causal=True)
VOCABULARY, LENGTH, BATCH = 301, 16, 3  # an odd vocabulary: shards are padded
SMALL = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4}


def built(config: TransformerConfig, *layout, **options) -> Transformer:
    groups = initialize_parallel(*layout)
    model = Transformer(VOCABULARY, config, groups, **options)
    initialize_parameters(model, 66, groups)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("extra_rows", [0, 1])
def test_paper_size_has_exactly_the_published_parameters(extra_rows):
    with torch.device("meta"):
        model = Transformer(100_278, TransformerConfig(), initialize_parallel(), extra_rows=extra_rows)
    count = {name: parameter.numel() for name, parameter in model.named_parameters()}
    vocabulary = count.pop("embedding.weight") + count.pop("head.linear.weight")
    assert vocabulary == 410_738_688 + extra_rows * 2048
    assert sum(count.values()) == 1_812_051_968


def test_shared_keys_and_values_have_fewer_parameters():
    grouped = built(TransformerConfig(**SMALL, num_key_value_heads=1)).blocks[0].attention
    assert grouped.qkv.weight.shape == (32 + 2 * 8, 32)
    assert grouped.output.weight.shape == (32, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 5}, "hidden_size=32 must be divisible by num_attention_heads (5)"),
        ({"num_attention_heads": 32}, "hidden_size / num_attention_heads = 1 must be even"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 must be divisible by num_key_value_heads (3)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError) as refusal:
        TransformerConfig(**{**SMALL, **change})
    assert message in str(refusal.value)


def test_rms_norm_is_its_formula():
    norm = RMSNorm(64, 1e-3, groups=initialize_parallel(), role=FIXED)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(64, generator=random))
    x = torch.randn(5, 3, 64, generator=random) * torch.logspace(-3, 3, 5)[:, None, None]
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), exact, rtol=1e-6, atol=0)


def test_rms_norm_of_bfloat16_is_computed_in_float32():
    norm = RMSNorm(64, 1e-5, groups=initialize_parallel(), role=FIXED).bfloat16()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(64, generator=random))
    x = torch.randn(200, 64, generator=random).bfloat16()
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    # Rounded once, or twice where torch rounds before the weight; never sums in bfloat16.
    torch.testing.assert_close(norm(x).double(), exact, rtol=2.0**-8, atol=0)


def masks() -> dict[str, AttentionMask]:
    documents = torch.arange(LENGTH).expand(2, LENGTH) // torch.tensor([[5], [16]])
    return {
        "causal": CAUSAL,
        "bidirectional": AttentionMask(),
        "documents": block_causal_mask(LENGTH, 1, CPU, documents),
        "blocks": block_causal_mask(LENGTH, 4, CPU),
    }


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("key_value_heads", [1, 2])
def test_a_shared_head_is_one_that_is_repeated(mask, key_value_heads):
    random, repeated = torch.Generator().manual_seed(0), 4 // key_value_heads
    q, k, v, weight = (
        torch.randn(2, heads, LENGTH, 8, generator=random, dtype=torch.float64, requires_grad=True)
        for heads in (4, key_value_heads, key_value_heads, 4)
    )
    form = masks()[mask]
    found = product(q, k, v, form.visible, form.causal)
    expected = product(q, *(x.repeat_interleave(repeated, dim=1) for x in (k, v)), form.visible, form.causal)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(
        *(torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_grouped_queries_are_a_transformer_whose_heads_are_repeated():
    grouped = built(TransformerConfig(**SMALL, num_key_value_heads=2))
    plain = built(TransformerConfig(**SMALL))
    state = grouped.state_dict()
    for name in [name for name in state if name.endswith("qkv.weight")]:
        rows = state[name].unflatten(0, (2, 4, 8))  # two shared heads of {two queries, key, value}
        state[name] = torch.cat([rows[:, [query, 2, 3]] for query in (0, 1)], dim=1).flatten(0, 2)
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(tokens(), CAUSAL), grouped(tokens(), CAUSAL), rtol=0, atol=2e-6)


def test_no_position_sees_a_later_one_and_with_documents_none_of_another():
    model, ids = built(TransformerConfig(**SMALL)), tokens()
    changed = ids.clone()
    changed[:, 9] += 1
    assert torch.equal(model(ids, CAUSAL)[:9], model(changed, CAUSAL)[:9])
    documents = (torch.arange(LENGTH) >= 10).long().expand(BATCH, LENGTH)
    mask = block_causal_mask(LENGTH, 1, CPU, documents)
    assert torch.equal(model(ids, mask)[10:], model(changed, mask)[10:])
    assert not torch.equal(model(ids, mask)[9], model(changed, mask)[9])


def loss_and_gradients(kv_heads: int, chunk: int, *layout) -> tuple[float, dict[str, np.ndarray]]:
    model = built(TransformerConfig(**SMALL, num_key_value_heads=kv_heads), *layout, extra_rows=1)
    ids, groups = tokens().t(), model.groups
    sum_partial_gradients(model, groups)
    x_SBH = model.run_blocks(model.embed(ids.t()), model.context(LENGTH, CPU, CAUSAL))
    weights = torch.linspace(0, 1, LENGTH)[:, None].expand(LENGTH, BATCH) / BATCH
    if chunk:
        loss = model.weighted_nll(x_SBH, ids, weights, chunk)
    else:
        loss = (weights * token_cross_entropy(model.logits(x_SBH), ids)).sum()
    loss.backward()
    gradients = gather_state_dict(model, groups, lambda parameter: parameter.grad)
    return loss.item(), {name: gradient.numpy() for name, gradient in gradients.items()}


def on_a_rank(kv_heads: int, sequence_parallel: bool) -> list[tuple[float, dict[str, np.ndarray]]]:
    return [loss_and_gradients(kv_heads, chunk, 2, sequence_parallel) for chunk in (0, 7)]


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_tensor_parallel_ranks_compute_the_loss_and_every_gradient_of_one_process(kv_heads, sequence_parallel):
    (expected,) = run_ranks(loss_and_gradients, 1, kv_heads, 0)
    for answers in run_ranks(on_a_rank, 2, kv_heads, sequence_parallel):
        for loss, gradients in answers:
            assert loss == pytest.approx(expected[0], rel=1e-6)
            assert gradients.keys() == expected[1].keys()
            for name, gradient in expected[1].items():
                assert np.linalg.norm(gradients[name] - gradient) <= 1e-5 * np.linalg.norm(gradient), name
