"""What Plaid is said to cost, against the model itself: FLOPs with the first estimate's pass, memory, traffic."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cola_megatron.config import load_config
from cola_megatron.costs.traffic import Traffic
from cola_megatron.families import family_of
from cola_megatron.layers import norms
from cola_megatron.parallel import initialize_parallel, initialize_parameters
from cola_megatron.planning.communication import tensor_traffic
from tests.live_memory import LiveMemory, SentBytes, fake_job, in_compute_type
from tests.ranks import run_ranks
from tests.support import random_batch
from tests.test_plaid_training import SMALL


@pytest.mark.parametrize("share", [0, 0.25, 1])
def test_flops_are_those_that_torch_counts(share):
    config = load_config("tiny-plaid", [*SMALL, f"objective.self_conditioning={share}", "objective.cut_share=0"])
    groups = initialize_parallel()
    model = family_of(config).build(config, groups)
    initialize_parameters(model, config.seed, groups)
    batch = random_batch(config, range(8))
    assert int(batch["self_conditioned"].sum()) == 8 * share
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch)["loss"].backward()
    said = 8 * sum(part.flops for part in family_of(config).parts(config))
    assert counter.get_total_flops() == pytest.approx(said, rel=0.05)  # the schedule's products are not in it


def test_the_steps_with_parameters_are_those_that_costs_are_counted_for():
    config = load_config("tiny-plaid", SMALL)
    model = family_of(config).build(config, initialize_parallel())
    expected = [(part.label, part.parameters) for part in family_of(config).parts(config)]
    for chain in (model.steps(), family_of(config).measurement(config).steps(model)):
        heavy = [step for step in chain if step.modules]
        counted = [sum(p.numel() for module in step.modules for p in module.parameters()) for step in heavy]
        assert [(step.part, count) for step, count in zip(heavy, counted, strict=True)] == expected


def test_the_presets_differ_from_those_of_the_other_families_in_model_and_objective_alone():
    for size in ("tiny", "small", "base", "paper-2b"):
        own, other = (load_config(f"{size}-{family}").model_dump() for family in ("plaid", "autoregressive"))
        assert own["model"]["transformer"] == other["model"]["transformer"]
        for section in ("training", "data", "parallel", "seed"):
            assert own[section] == other[section], (size, section)


def measured(overrides: list[str], ranks: int) -> dict[str, tuple[float, float]]:
    """(measured, said) bytes of one micro-batch on rank 0; see `tests.test_transformer_costs.measured`.

    Which samples are told a first estimate, and which are cut, is in the values of a batch: both are off.
    """
    norms.F.rms_norm = lambda x, shape, weight, eps: torch.nn.functional.layer_norm(x, shape, weight, None, eps)
    off = ["objective.self_conditioning=0", "objective.cut_share=0"]
    config = load_config("paper-2b-plaid", [*off, *overrides])
    family = family_of(config)
    with fake_job(ranks) as mode, LiveMemory() as live:
        groups = initialize_parallel(config.parallel.tensor_parallel_size, config.parallel.sequence_parallel)
        batch = random_batch(config, range(config.training.micro_batch_size))
        batch = {name: mode.from_tensor(tensor) for name, tensor in batch.items()}
        model = in_compute_type(family.build(config, groups), torch.bfloat16)
        model(batch)
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
        (1, ["training.loss_chunk_tokens=0"]),
        (1, ["training.loss_chunk_tokens=256", "training.activation_checkpointing=true"]),
        (2, TENSOR),
        (2, [*TENSOR, "parallel.sequence_parallel=true", "training.loss_chunk_tokens=256"]),
    ],
)
def test_what_is_kept_and_sent_is_what_is_said(ranks, overrides):
    (found,) = run_ranks(measured, 1, [*EIGHT, *overrides], ranks)
    for name, (real, said) in found.items():
        print(f"{overrides} {name}: {real / 2**20:,.1f} MiB, said {said / 2**20:,.1f}")
        assert said == pytest.approx(real, rel=0.05), name
