"""Attention inside documents by a kernel of variable lengths: the same numbers as under a mask of all pairs.

The kernels need a GPU, so a plain one stands for them where the numbers count (`plain`), and fakes of the two libraries
where their calls do.
"""

import importlib.machinery
import sys
import types

import pytest
import torch
from torch.nn import functional as F

from cola_megatron.config import ConfigError, TrainingConfig
from cola_megatron.config.resolve import resolve_config
from cola_megatron.inference import cached_attention
from cola_megatron.inference.cached_attention import PackedPrompts
from cola_megatron.layers import packed_documents
from cola_megatron.layers.attention import attend
from cola_megatron.layers.masks import block_causal_mask
from cola_megatron.models import document_kernel
from cola_megatron.parallel import initialize_parallel, initialize_parameters
from cola_megatron.training.build_model import build_model
from tests.support import perturbed, random_batch

CPU = torch.device("cpu")
DOCUMENTS = torch.tensor([[0] * 5 + [1] + [2] * 6, [0] * 12, [0] * 9 + [-1] * 3])


def plain(q, k, v, starts, longest, causal):
    assert starts.dtype == torch.int32 and int(starts.diff().max()) <= longest
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    documents = zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
    parts = [
        F.scaled_dot_product_attention(*(x[a:b].transpose(0, 1) for x in (q, k, v)), is_causal=causal)
        for a, b in documents
        if b > a
    ]
    return torch.cat(parts, dim=1).transpose(0, 1)


@pytest.mark.parametrize("block_size", [1, 12])
@pytest.mark.parametrize("shared_by", [1, 2])
def test_it_is_attention_under_the_mask(block_size, shared_by):
    random = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(12, 3, heads, 8, dtype=torch.float64, generator=random, requires_grad=True)
        for heads in (4, 4 // shared_by, 4 // shared_by)
    )
    packed = block_causal_mask(12, block_size, CPU, DOCUMENTS, plain)
    dense = block_causal_mask(12, block_size, CPU, DOCUMENTS)
    assert packed.visible is None and dense.documents is None
    expected, found = attend(q, k, v, dense), attend(q, k, v, packed)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn(expected.shape, dtype=torch.float64, generator=random)
    for ours, theirs in zip(
        torch.autograd.grad(found, (q, k, v), cotangent),
        torch.autograd.grad(expected, (q, k, v), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_blocks_keep_their_mask():
    assert block_causal_mask(12, 4, CPU, DOCUMENTS, plain).visible is not None


def test_there_are_few_shapes_of_starts():
    """A compiled layer has a graph for each."""
    shapes = set()
    for documents in range(1, 65):
        packed = packed_documents.pack_documents(torch.arange(64)[None].clamp(max=documents - 1), plain)
        assert packed.starts_N.unique().tolist() == [*range(documents), 64]
        shapes.add(len(packed.starts_N))
    assert len(shapes) == 7


TRANSFORMER = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 48}
FAMILIES = {
    "cola, stage 1": {
        "stage": 1,
        "model": {
            "vae": {
                "hidden_size": 32,
                "ffn_hidden_size": 64,
                "latent_dim": 16,
                "patch_size": 2,
                "num_attention_heads": 4,
                "encoder_layers": 1,
                "decoder_layers": 1,
            },
        },
    },
    "autoregressive": {"model": {"family": "autoregressive", "transformer": TRANSFORMER}},
    "masked diffusion": {
        "model": {"family": "masked_diffusion", "transformer": TRANSFORMER},
        "objective": {"random_length_share": 1.0},
    },
    "plaid": {"model": {"family": "plaid", "transformer": TRANSFORMER}, "objective": {"cut_share": 0.5}},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_the_same_with_it(name, monkeypatch):
    tree = FAMILIES[name]
    config = resolve_config(
        {
            **tree,
            "model": {"vocab_size": 300, **tree["model"]},
            "data": {"sequence_length": 32, "document_attention": True},
            "training": {"precision": "fp32", "global_batch_size": 4, "micro_batch_size": 4},
        }
    )
    batch = random_batch(config, range(4))
    batch["documents"][0, 11:], batch["documents"][1, 20:] = 1, 1
    batch["counted"][2, 28:], batch["documents"][2, 28:] = False, -1
    calls = []

    def counted(*inputs):
        calls.append(inputs)
        return plain(*inputs)

    def gradients(kernel):
        monkeypatch.setattr(document_kernel, "kernel_of_variable_lengths", lambda device, dtype: kernel)
        groups = initialize_parallel()
        model = build_model(config, groups)
        initialize_parameters(model, config.seed, groups)
        loss = perturbed(model)(batch)["loss"]
        named = {name: each for name, each in model.named_parameters() if each.requires_grad}
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
        return {"loss": loss, **dict(zip(named, found, strict=True))}

    expected = gradients(None)
    assert not calls
    found = gradients(counted)
    assert calls
    for name, value in expected.items():
        # Sums of float32 in another order.
        assert (found[name] - value).norm() <= 1e-5 * value.norm() + 1e-8, name


def test_a_run_may_insist_on_it_and_do_without_it():
    on_a_cpu = TrainingConfig(document_kernel="always")
    with pytest.raises(ConfigError, match=r"document_kernel=always needs .* not bf16 on cpu"):
        document_kernel.document_kernel(on_a_cpu, CPU)
    assert document_kernel.document_kernel(TrainingConfig(), CPU) is None


def test_prompts_of_several_lengths_are_one_product(monkeypatch):
    lengths = [5, 1, 6]
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(12, 1, heads, 8, dtype=torch.float64, generator=random) for heads in (4, 2, 2))
    expected = PackedPrompts(lengths, 1, CPU).attend(torch.nn.Identity(), q, k, v)
    calls = []

    def counted(*inputs):
        calls.append(inputs)
        return plain(*inputs)

    monkeypatch.setattr(cached_attention, "kernel_of_variable_lengths", lambda device, dtype: counted)
    found = PackedPrompts(lengths, 1, CPU).attend(torch.nn.Identity(), q, k, v)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert len(calls) == 1
    by_blocks = PackedPrompts(lengths, 4, CPU).attend(torch.nn.Identity(), q, k, v)
    assert len(calls) == 1 and not torch.allclose(by_blocks, expected)


@pytest.fixture
def kernel_anew():
    packed_documents.installed_kernel.cache_clear()
    yield packed_documents.installed_kernel
    packed_documents.installed_kernel.cache_clear()


STARTS = torch.tensor([0, 2, 6, 6], dtype=torch.int32)


def test_flash_attn_is_called_as_it_wants_to_be(monkeypatch, kernel_anew):
    def flash_attn_varlen_func(  # its signature
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):
        assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k and not dropout_p and softmax_scale is None
        return plain(q, k, v, cu_seqlens_q, max_seqlen_q, causal)

    module = types.ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    package, kernel = kernel_anew()
    assert package == "flash-attn"
    check(kernel)


def of_torch_2_12(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False, num_splits=None
):
    assert enable_gqa == (key.shape[1] < query.shape[1])
    return plain(query, key, value, cu_seq_q, max_q, window_size == (-1, 0))


def of_torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    assert key.shape == query.shape
    return plain(query, key, value, cu_seq_q, max_q, window_size == (-1, 0))


def of_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert key.shape == query.shape
    return plain(query, key, value, cu_seq_q, max_q, is_causal)


@pytest.mark.parametrize("library", [of_torch_2_10, of_torch_2_11, of_torch_2_12])
def test_torch_is_called_as_its_version_wants_to_be(library, monkeypatch, kernel_anew):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", library)
    package, kernel = kernel_anew()
    assert package == "torch"
    check(kernel)


def check(kernel):
    for heads in (4, 2):
        q, k, v = (torch.randn(6, number, 8) for number in (4, heads, heads))
        for causal in (True, False):
            torch.testing.assert_close(kernel(q, k, v, STARTS, 4, causal), plain(q, k, v, STARTS, 4, causal))
