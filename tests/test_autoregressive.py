"""The autoregressive family in training: its definition, its chain, what a held-out measurement says of it."""

import math

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from cola_megatron.config.autoregressive import AutoregressiveConfig
from cola_megatron.families.autoregressive.chain import Autoregressive
from cola_megatron.families.autoregressive.loss import autoregressive_loss, next_tokens
from cola_megatron.families.autoregressive.measurement import NextTokenMeasurement
from cola_megatron.layers.masks import AttentionMask
from cola_megatron.models.compiled_blocks import compile_blocks
from cola_megatron.models.steps import cut_chain, run_steps
from cola_megatron.parallel import gather_state_dict, initialize_parallel, initialize_parameters, sum_partial_gradients
from tests.ranks import run_ranks
from tests.support import perturbed

LENGTH, VOCABULARY = 32, 301  # an odd vocabulary: shards are padded
TRANSFORMER = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def config_of(document_attention: bool = False, **training) -> AutoregressiveConfig:
    return AutoregressiveConfig.model_validate(
        {
            "model": {"vocab_size": VOCABULARY, "transformer": TRANSFORMER},
            "data": {"sequence_length": LENGTH, "document_attention": document_attention},
            "training": {"precision": "fp32", **training},
        }
    )


def model_of(config: AutoregressiveConfig, *layout) -> Autoregressive:
    groups = initialize_parallel(*layout)
    model = Autoregressive(config, groups)
    initialize_parameters(model, config.seed, groups)
    return model


def batch_of(samples: int = 3) -> dict[str, torch.Tensor]:
    """Of two documents and padding, of two documents, of one."""
    tokens = torch.randint(VOCABULARY, (samples, LENGTH), generator=torch.Generator().manual_seed(0))
    documents, counted = torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool)
    documents[0, 11:] = documents[1, 20:] = 1
    counted[0, 28:], documents[0, 28:] = False, -1
    return {"tokens": tokens, "counted": counted, "documents": documents}


def gradients(model: Autoregressive, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, named.values()), strict=True))


def test_each_position_predicts_the_next_token_that_counts():
    batch = batch_of()
    targets, counts = next_tokens(batch["tokens"], batch["counted"], None)
    assert torch.equal(targets[:-1], batch["tokens"].t()[1:])
    assert counts.sum(0).tolist() == [27, 31, 31]  # of 28, 32 and 32 tokens, the first of each is nobody's target
    assert not counts[27, 0] and not counts[-1].any()
    _, inside = next_tokens(batch["tokens"], batch["counted"], batch["documents"])
    assert inside.sum(0).tolist() == [26, 30, 31] and not inside[10, 0] and not inside[19, 1]


def test_the_loss_is_the_mean_over_samples_of_the_mean_over_their_targets():
    model, batch = perturbed(model_of(config_of())), batch_of()
    logits = model.transformer(batch["tokens"], AttentionMask(causal=True)).double()
    log_p = logits.log_softmax(-1)
    of_samples = []
    for sample, last in enumerate((28, 32, 32)):
        of_samples.append(
            torch.stack([log_p[place, sample, batch["tokens"][sample, place + 1]] for place in range(last - 1)]).mean()
        )
    expected = -torch.stack(of_samples).mean()
    assert model(batch)["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"document_attention": True}, {"activation_checkpointing": True}])
def test_the_chain_computes_the_definition(options):
    model, batch = perturbed(model_of(config_of(**options))), batch_of()
    in_chain, defined = model(batch), autoregressive_loss(model.transformer, batch, model.config)
    assert in_chain.keys() == defined.keys()
    assert all(torch.equal(in_chain[term], defined[term]) for term in in_chain)
    found = gradients(model, in_chain["loss"])
    for name, gradient in gradients(model, defined["loss"]).items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("chunk", [7, 4096])
def test_a_loss_in_chunks_is_the_loss(chunk):
    plain, batch = model_of(config_of()), batch_of()
    chunked = model_of(config_of(loss_chunk_tokens=chunk))
    expected, found = plain(batch)["loss"], chunked(batch)["loss"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    of_chunks = gradients(chunked, found)
    for name, gradient in gradients(plain, expected).items():
        assert (of_chunks[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("options", [{}, {"document_attention": True}])
def test_every_cut_of_the_chain_computes_the_same(options):
    model, batch = model_of(config_of(**options)), batch_of()
    whole, heavy = model(batch)["loss"], 2 + len(model.transformer.blocks)
    for cut in range(1, heavy):
        first, second = cut_chain(model.steps(), (cut, heavy - cut), model.batch_names)
        assert first.hands_on == second.takes == ("hidden",)
        taken = run_steps(first.steps, batch, keep=first.hands_on)
        state = run_steps(second.steps, {**batch, "hidden": taken["hidden"]})
        assert torch.equal(state["loss_next_token"], whole)


def test_one_batch_is_learned_by_heart():
    model, batch = model_of(config_of()), batch_of(2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(batch)["loss"].backward()
        optimizer.step()
    assert model(batch)["loss"].item() < 0.02


def loss_and_gradients(document_attention: bool, chunk: int, *layout) -> tuple[float, dict[str, np.ndarray]]:
    model = model_of(config_of(document_attention, loss_chunk_tokens=chunk), *layout)
    sum_partial_gradients(model, model.groups)
    loss = model(batch_of())["loss"]
    loss.backward()
    found = gather_state_dict(model, model.groups, lambda parameter: parameter.grad)
    return loss.item(), {name: gradient.numpy() for name, gradient in found.items()}


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(("document_attention", "chunk"), [(False, 0), (True, 7)])
def test_tensor_parallel_ranks_are_one_process(document_attention, chunk, sequence_parallel):
    (expected,) = run_ranks(loss_and_gradients, 1, document_attention, 0)
    for loss, found in run_ranks(loss_and_gradients, 2, document_attention, chunk, 2, sequence_parallel):
        assert loss == pytest.approx(expected[0], rel=1e-6)
        assert found.keys() == expected[1].keys()
        for name, gradient in expected[1].items():
            assert np.linalg.norm(found[name] - gradient) <= 1e-5 * np.linalg.norm(gradient), name


def measured(batches: list[dict[str, torch.Tensor]], model: Autoregressive) -> dict[str, float]:
    measurement = NextTokenMeasurement()
    chain, total = measurement.steps(model), torch.zeros(measurement.shapes["sum_moments"], dtype=torch.float64)
    model.own_stage_of(chain, {*model.batch_names, "weight", *measurement.batch_names}, ["sum_moments"])
    for batch in batches:
        total += run_steps(chain, batch)["sum_moments"]
    return measurement.metrics({"sum_moments": total})


def test_a_measurement_is_of_tokens_and_its_error_of_samples():
    model, batch = perturbed(model_of(config_of())), batch_of()
    logits = model.transformer(batch["tokens"], AttentionMask(causal=True))
    targets, counts = next_tokens(batch["tokens"], batch["counted"], None)
    nll = torch.nn.functional.cross_entropy(logits.permute(0, 2, 1), targets, reduction="none").double() * counts
    right = (logits.argmax(-1) == targets) & counts
    filler = {**batch, "weight": torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)}
    found = measured([{**batch, "weight": torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)}, filler], model)
    tokens, samples = counts.sum(0).double(), 3
    ratio = (nll.sum() / tokens.sum()).item()
    assert found["nats_per_token"] == pytest.approx(ratio, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(ratio), rel=1e-5)
    assert found["next_token_accuracy"] == pytest.approx((right.sum() / tokens.sum()).item(), rel=1e-6)
    residual = (nll.sum(0) - ratio * tokens) / tokens.mean()
    error = math.sqrt((residual.square().sum() / (samples - 1) / samples).item())
    assert found["nats_per_token_standard_error"] == pytest.approx(error, rel=1e-4)


def test_one_sample_has_no_error_and_none_no_figures():
    model, batch = model_of(config_of()), batch_of(3)
    weights = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    assert "nats_per_token_standard_error" not in measured([{**batch, "weight": weights}], model)
    assert measured([{**batch, "weight": 0 * weights}], model) == {}


@pytest.mark.parametrize("document_attention", [False, True])
def test_compiled_blocks_are_one_graph_that_computes_the_same(document_attention):
    counters.clear()
    torch._dynamo.reset()
    plain, compiled = (perturbed(model_of(config_of(document_attention))) for _ in range(2))
    graphs = CompileCounterWithBackend("aot_eager")
    assert compile_blocks(compiled, graphs) == len(plain.transformer.blocks)
    for _ in range(2):
        expected, found = plain(batch_of())["loss"], compiled(batch_of())["loss"]
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
        of_graphs = gradients(compiled, found)
        for name, gradient in gradients(plain, expected).items():
            assert (of_graphs[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert graphs.frame_count == 1 and not counters["graph_break"]
