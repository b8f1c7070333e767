"""The architecture: parameter counts, masks, distinct times, tensor-parallel layout of fused rows."""

import pytest
import torch

from cola_megatron.config import load_config
from cola_megatron.families.cola.chain import Cola
from cola_megatron.layers.attention import attend
from cola_megatron.layers.masks import block_causal_mask, two_copies_in_chunks, two_copy_mask
from cola_megatron.layers.time_embedding import look_up
from cola_megatron.models import DiT, TextVAE
from cola_megatron.models.attention_chunks import attention_chunk
from cola_megatron.models.dit import two_copy_times
from cola_megatron.models.steps import run_steps, steps_for
from cola_megatron.parallel import initialize_parallel, initialize_parameters
from tests.support import perturbed, random_batch

CPU = torch.device("cpu")


def test_paper_size_has_exactly_the_published_parameters():
    model, groups = load_config("paper-2b").model, initialize_parallel()
    with torch.device("meta"):
        vae, dit = TextVAE(model.vocab_size, model.vae, groups), DiT(model.dit, groups)
    assert sum(parameter.numel() for parameter in vae.parameters()) == 501_871_574
    assert sum(parameter.numel() for parameter in dit.parameters()) == 1_829_875_728


def dense(mask, length: int) -> torch.Tensor:
    if mask.visible is not None:
        return mask.visible
    full = torch.ones(length, length, dtype=torch.bool)
    return full.tril() if mask.causal else full


@pytest.mark.parametrize("block_size", [1, 2, 4, 12])
def test_block_causal_mask_from_its_definition(block_size):
    visible = dense(block_causal_mask(12, block_size, CPU), 12)
    for query in range(12):
        for key in range(12):
            assert visible[query, key] == (key // block_size <= query // block_size)


@pytest.mark.parametrize("clean_length", [12, 8])
def test_two_copy_mask_from_its_definition(clean_length):
    visible = two_copy_mask(12, 4, clean_length).visible
    copies = [(False, i) for i in range(clean_length)] + [(True, i) for i in range(12)]
    for query, (query_noisy, q) in enumerate(copies):
        for key, (key_noisy, k) in enumerate(copies):
            if not query_noisy:
                expected = not key_noisy and k // 4 <= q // 4
            else:
                expected = k // 4 == q // 4 if key_noisy else k // 4 < q // 4
            assert visible[query, key] == expected


def test_a_block_whose_context_is_dropped_sees_itself_alone():
    dropped = torch.tensor([[False, True, False], [False, False, False]])
    visible = two_copy_mask(12, 4, 8, dropped).visible[:, 0]
    assert not visible[0, 8 + 4 : 8 + 8, :8].any()
    assert visible[0, 8 + 8 :, :8].all()
    assert torch.equal(visible[1], two_copy_mask(12, 4, 8).visible)


def test_times_are_embedded_once_each_and_found_by_every_position():
    times = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    at_zero = torch.zeros(2, 8, dtype=torch.bool)
    at_zero[1, 4] = True
    table = two_copy_times(times, length=8, clean_length=4, at_zero_BS=at_zero)
    assert table.times_T.tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    found = table.times_T[table.rows.rows_SB]
    assert (found[:4] == 0).all()
    assert found[4:, 0].tolist() == pytest.approx([0.1] * 4 + [0.2] * 4)
    assert found[4:, 1].tolist() == pytest.approx([0.3] * 4 + [0.0] + [0.4] * 3)


def test_modulations_run_on_distinct_times_only(tiny):
    config, groups = tiny(2), initialize_parallel()
    model = Cola(config, groups)
    initialize_parameters(model, config.seed, groups)
    rows = []
    for block in model.dit.blocks:
        block.ffn_gate.linear.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[0]))
    batch = random_batch(config, range(4))
    model(batch)
    assert rows == [1 + batch["time"].numel()] * len(model.dit.blocks)


def test_start_depends_on_seed_and_name_alone(tiny):
    groups = initialize_parallel()
    one, two, other = (Cola(tiny(stage), groups) for stage in (1, 2, 2))
    initialize_parameters(one, 66, groups)
    initialize_parameters(two, 66, groups)
    initialize_parameters(other, 67, groups)
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, two.get_parameter(name))
    assert not torch.equal(two.dit.input.weight, other.dit.input.weight)


def test_a_fresh_prior_predicts_zero_velocity_and_its_gates_are_closed(tiny):
    config, groups = tiny(2), initialize_parallel()
    model = Cola(config, groups)
    initialize_parameters(model, config.seed, groups)
    batch = random_batch(config, range(4))
    state = run_steps(steps_for(model.steps(), ["velocity"], batch), batch)
    assert state["velocity"].abs().max() == 0


@pytest.mark.parametrize("stage", [1, 2])
def test_recomputation_changes_no_gradient(tiny, stage):
    groups, gradients = initialize_parallel(), []
    for recompute in ("false", "true"):
        config = tiny(stage, f"training.activation_checkpointing={recompute}")
        model = Cola(config, groups)
        initialize_parameters(model, config.seed, groups)
        perturbed(model)
        model(random_batch(config, range(4)))["loss"].backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert len(gradients[0]) == len(gradients[1])
    for kept, recomputed in zip(*gradients, strict=True):
        assert torch.equal(kept, recomputed)


@pytest.mark.parametrize("blocks", [1, 4])
def test_rows_of_times_have_the_gradient_of_an_embedding(blocks):
    random = torch.Generator().manual_seed(0)
    at_zero = torch.rand(3, 16, generator=random) < 0.3
    times, rows = two_copy_times(torch.rand(3, blocks, generator=random), 16, 12, at_zero)
    table = torch.randn(len(times), 10, generator=random, requires_grad=True)
    weight = torch.randn(28, 3, 10, generator=random)
    found = look_up(table, rows)
    expected = torch.nn.functional.embedding(rows.rows_SB, table)
    assert torch.equal(found, expected)
    (ours,), (theirs,) = (torch.autograd.grad((rows * weight).sum(), table) for rows in (found, expected))
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()  # float32 sums in another order


@pytest.mark.parametrize("size", [4, 6, 8, 100])
@pytest.mark.parametrize("clean_length", [28, 32])
def test_attention_in_chunks_is_attention(size, clean_length):
    random = torch.Generator().manual_seed(0)
    dropped = torch.rand(3, 8, generator=random) < 0.3
    documents = torch.arange(32).expand(3, 32) // torch.tensor([[9], [20], [32]])
    mask = two_copy_mask(32, 4, clean_length, dropped, documents_BL=documents)
    chunked = two_copies_in_chunks(mask, 32, clean_length, 4, size)
    q, k, v = (
        torch.randn(clean_length + 32, 3, 2, 8, generator=random, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    )
    weight = torch.randn(clean_length + 32, 3, 16, generator=random, dtype=torch.float64)
    whole, in_chunks = (attend(q, k, v, form) for form in (mask, chunked))
    assert torch.allclose(in_chunks, whole, rtol=0, atol=1e-12)
    for ours, theirs in zip(
        *(torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (in_chunks, whole)), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_chunks_leave_out_pairs_and_come_by_themselves_on_a_cpu_where_they_pay(tiny):
    mask = two_copy_mask(512, 16, 496)
    pairs = sum(chunk.visible.numel() for chunk in two_copies_in_chunks(mask, 512, 496, 16, 256).chunks)
    assert pairs < 0.53 * 1008**2
    training, cpu, gpu = tiny(2).training, torch.device("cpu"), torch.device("cuda")
    assert attention_chunk(training, 512, cpu) == 256
    assert attention_chunk(training, 512, gpu) == 0
    assert attention_chunk(training, 32, cpu) == 0
    assert attention_chunk(tiny(2, "training.attention_chunk=8").training, 32, gpu) == 8
