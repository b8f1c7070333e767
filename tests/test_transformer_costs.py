"""What the shared transformer is said to cost, against the network itself: parameters, FLOPs, memory, traffic."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cola_megatron.config import RunConfig, load_config
from cola_megatron.costs.part import causal_pairs, two_copy_pairs
from cola_megatron.costs.traffic import Traffic
from cola_megatron.families import family_of
from cola_megatron.families.transformer_costs import TransformerCosts
from cola_megatron.layers import norms
from cola_megatron.layers.embedding import token_cross_entropy
from cola_megatron.layers.masks import AttentionMask
from cola_megatron.models.transformer import Transformer
from cola_megatron.parallel import initialize_parallel, initialize_parameters
from cola_megatron.planning.communication import tensor_traffic
from tests.live_memory import LiveMemory, SentBytes, fake_job, in_compute_type
from tests.ranks import run_ranks
from tests.support import random_batch

GROUPED = ["model.transformer.num_key_value_heads=2"]
SMALL = [
    "model.vocab_size=300",
    "model.transformer.num_layers=3",
    "model.transformer.hidden_size=32",
    "model.transformer.ffn_hidden_size=48",
    "data.sequence_length=32",
    "training.micro_batch_size=2",
]


def config_of(*overrides: str, preset: str = "tiny-autoregressive") -> RunConfig:
    return load_config(preset, [*(SMALL if preset.startswith("tiny") else []), *overrides])


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("tiny", 2_190_976),
        ("small", 40_904_064),
        ("base", 333_363_456),
        ("paper-2b", 1_812_051_968 + 410_738_688),
    ],
)
def test_the_presets_have_the_parameters_that_they_say(preset, parameters):
    config = load_config(f"{preset}-autoregressive")
    parts, groups = family_of(config).parts(config), initialize_parallel()
    assert sum(part.parameters for part in parts) == parameters
    with torch.device("meta"):
        model = Transformer(config.model.vocab_size, config.model.transformer, groups)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_the_presets_differ_from_those_of_cola_in_the_model_alone():
    for size in ("tiny", "small", "base", "paper-2b"):
        own, cola = (load_config(name).model_dump() for name in (f"{size}-autoregressive", size))
        for only_cola in ("stage_one", "vae_update"):
            del cola["training"][only_cola]
        for section in ("training", "data", "parallel", "seed"):
            assert own[section] == cola[section], (size, section)


@pytest.mark.parametrize("overrides", [[], GROUPED])
def test_the_steps_with_parameters_are_those_that_costs_are_counted_for(overrides):
    config = config_of(*overrides)
    model = family_of(config).build(config, initialize_parallel())
    expected = [(part.label, part.parameters) for part in family_of(config).parts(config)]
    for chain in (model.steps(), family_of(config).measurement(config).steps(model)):
        heavy = [step for step in chain if step.modules]
        counted = [sum(p.numel() for module in step.modules for p in module.parameters()) for step in heavy]
        assert [(step.part, count) for step, count in zip(heavy, counted, strict=True)] == expected


@pytest.mark.parametrize("overrides", [[], GROUPED])
@pytest.mark.parametrize("causal", [True, False])
def test_flops_are_those_that_torch_counts(overrides, causal):
    """torch counts the plain product, which computes every pair; the mask keeps fewer."""
    config, groups = config_of(*overrides), initialize_parallel()
    model = Transformer(300, config.model.transformer, groups)
    initialize_parameters(model, 0, groups)
    tokens = torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(0))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(tokens, AttentionMask(causal=causal))
        token_cross_entropy(logits, tokens.t()).sum().backward()
    pairs = TransformerCosts(config, config.model.transformer, 32, 32 * 32).parts()
    assert counter.get_total_flops() == pytest.approx(2 * sum(part.flops for part in pairs), rel=0.03)
    kept = TransformerCosts(config, config.model.transformer, 32, causal_pairs(32, 1)).parts()
    block = kept[1]
    assert block.attention_macs / pairs[1].attention_macs == (32 + 1) / (2 * 32)
    assert block.matrix_macs == pairs[1].matrix_macs


def test_two_copies_have_their_positions_in_the_blocks_and_one_in_the_head():
    config = config_of()
    costs = TransformerCosts(
        config, config.model.transformer, 2 * 32 - 8, two_copy_pairs(32, 8), extra_rows=1, head_positions=32, masks=1
    )
    embed, block, *_, head = costs.parts()
    one = TransformerCosts(config, config.model.transformer, 32, causal_pairs(32, 1)).parts()
    assert embed.parameters == one[0].parameters + 32
    assert block.matrix_macs == one[1].matrix_macs * 56 / 32
    assert head.matrix_macs == one[-1].matrix_macs
    assert block.computed_pairs == 56 * 56 / two_copy_pairs(32, 8) > 1 == one[1].computed_pairs


# ---- memory and traffic: paper-2b, without memory -------------------------------------------------------------------


def measured(overrides: list[str], ranks: int) -> dict[str, tuple[float, float]]:
    """(measured, said) bytes of one micro-batch on rank 0.

    On a GPU torch's RMSNorm is one kernel and keeps its input, as LayerNorm does everywhere; on a CPU it is several
    operations, which keep float32 copies of it.
    """
    norms.F.rms_norm = lambda x, shape, weight, eps: torch.nn.functional.layer_norm(x, shape, weight, None, eps)
    config = config_of(*overrides, preset="paper-2b-autoregressive")
    family = family_of(config)
    with fake_job(ranks) as mode, LiveMemory() as live:
        groups = initialize_parallel(config.parallel.tensor_parallel_size, config.parallel.sequence_parallel)
        batch = random_batch(config, range(config.training.micro_batch_size))
        batch = {name: mode.from_tensor(tensor) for name, tensor in batch.items()}
        model = in_compute_type(family.build(config, groups), torch.bfloat16)
        model(batch)  # what is made once, such as a table of positions, does not count
        before = live.now
        with SentBytes() as sent:
            outputs = model(batch)
            kept = live.now - before
            outputs["loss"].backward()
    parts = family.parts(config)
    recomputes = config.training.activation_checkpointing
    said = sum(
        part.activations.output if recomputes and part.activations.recomputable else part.activations.kept
        for part in parts
    )
    traffic = sum((tensor_traffic(config, part) for part in parts), Traffic())
    return {"kept": (kept, said), "sent": (sent.bytes * (ranks - 1) / ranks, traffic.bytes)}


TENSOR = ["parallel.tensor_parallel_size=2"]
EIGHT = ["model.transformer.num_layers=8", "training.micro_batch_size=2"]


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, []),
        (1, ["model.transformer.num_key_value_heads=4"]),
        (1, ["data.document_attention=true", "training.loss_chunk_tokens=0"]),
        (1, ["training.activation_checkpointing=true"]),
        (2, TENSOR),
        (2, [*TENSOR, "parallel.sequence_parallel=true", "training.loss_chunk_tokens=0"]),
        (2, [*TENSOR, "parallel.sequence_parallel=true", "model.transformer.num_key_value_heads=4"]),
    ],
)
def test_what_is_kept_and_sent_is_what_is_said(ranks, overrides):
    (found,) = run_ranks(measured, 1, [*EIGHT, *overrides], ranks)
    for name, (real, said) in found.items():
        print(f"{overrides} {name}: {real / 2**20:,.1f} MiB, said {said / 2**20:,.1f}")
        assert said == pytest.approx(real, rel=0.05), name
