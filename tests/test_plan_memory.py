"""The estimates of memory and traffic behind `cola plan`, against real engines.

Run with `-s` to see what was measured beside what was estimated.
"""

import gc
import itertools

import pytest
import torch

from cola_megatron.config import RunConfig, load_config
from cola_megatron.costs.traffic import Traffic
from cola_megatron.families import family_of
from cola_megatron.families.cola.chain import Cola
from cola_megatron.layers import norms, vocabulary_loss
from cola_megatron.parallel import initialize_parallel, initialize_parameters
from cola_megatron.planning.communication import data_traffic, tensor_traffic
from cola_megatron.planning.memory import micro_batches, rank_memory
from cola_megatron.planning.split import pipeline_split
from tests.live_memory import LiveMemory, SentBytes, bytes_of, fake_job, in_compute_type
from tests.ranks import run_ranks
from tests.support import random_batch

MIB = 2**20


def estimate(config, replicas: int):
    return rank_memory(config, replicas, pipeline_split(config, replicas))


def report(what: str, measured: float, estimated: float) -> None:
    print(f"{what}: {measured / MIB:,.1f} MiB, estimated {estimated / MIB:,.1f} ({estimated / measured - 1:+.1%})")


# ---- memory: paper-2b, really built, without memory -----------------------------------------------------------------


def with_recomputation(config: RunConfig, recompute: bool) -> RunConfig:
    training = config.training.model_copy(update={"activation_checkpointing": recompute})
    return config.model_copy(update={"training": training})


def kernels_of_a_gpu() -> None:
    """What is one kernel on a GPU, and on a CPU several operations with float32 copies between them.

    torch's RMSNorm, which keeps its input as LayerNorm does everywhere; the parts of the chunked cross-entropy.
    """
    norms.F.rms_norm = lambda x, shape, weight, eps: torch.nn.functional.layer_norm(x, shape, weight, None, eps)
    vocabulary_loss._logsumexp = lambda logits_nP: torch.empty(len(logits_nP))
    vocabulary_loss._softmax_gradient = lambda logits_nP, *others: torch.empty_like(logits_nP)


def fake_paper_2b(preset: str, overrides: list[str], world_size: int) -> dict[str, tuple[float, float]]:
    """(measured, estimated) bytes of rank 0, in memory and on the links.

    A real engine on fake tensors; passes of one micro-batch; one whole optimiser step.
    """
    import cola_megatron.training.engine as engine_module

    build = engine_module.build_optimizer

    def build_fused(*arguments) -> torch.optim.Optimizer:
        optimizer = build(*arguments)
        for group in optimizer.param_groups:
            group["fused"] = True  # as on CUDA: without it AdamW makes copies of a whole partition
        return optimizer

    engine_module.build_optimizer = build_fused
    kernels_of_a_gpu()
    config = load_config(preset, overrides)
    family = family_of(config)
    with fake_job(world_size) as mode, LiveMemory() as live:
        parallel = config.parallel
        groups = initialize_parallel(
            parallel.tensor_parallel_size,
            parallel.sequence_parallel,
            context_parallel_size=parallel.context_parallel_size,
        )
        expected, *_ = estimate(config, groups.data_parallel_size)
        micro_batch = random_batch(config, range(config.training.micro_batch_size))
        batch = {name: mode.from_tensor(tensor) for name, tensor in micro_batch.items()}
        model = in_compute_type(family.build(config, groups), torch.bfloat16)
        engine = engine_module.Engine(model, config, groups)
        on_the_host = bytes_of(engine.frozen.values())
        optimizer, parameters = engine.deepspeed.optimizer, list(model.parameters())
        for flat, gradient in zip(
            optimizer.fp32_groups_flat_partition, optimizer.fp32_groups_gradient_flat_partition, strict=True
        ):
            flat.grad = gradient
        optimizer.optimizer.step()  # makes the moments

        activations, outputs = {}, None
        for recompute in (True, False):
            model.config = with_recomputation(config, recompute)
            model._chains.clear()
            outputs = None  # lets go of the pass before
            before = live.now
            with SentBytes() as sent:
                outputs = model(batch)
            activations[recompute] = live.now - before
        with sent:
            outputs["loss"].backward()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        states = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.dim()]
        found = {
            "weights": (bytes_of(parameters), expected.states.weights),
            "gradients": (
                bytes_of([*gradients, *optimizer.fp32_groups_gradients_flat]),
                expected.states.gradients + expected.states.parameter_gradients,
            ),
            "optimiser": (bytes_of([*states, *optimizer.fp32_groups_flat_partition]), expected.states.optimizer),
            "activations": (activations[False], expected.activations_kept),
            "activations, recomputed": (activations[True], expected.activations_recomputed),
        }
        del outputs, gradients
        model.config = config
        model._chains.clear()
        optimizer.clear_lp_grads(set_to_none=True)
        live.peak = 0
        with SentBytes() as reduced:
            engine.step(itertools.repeat(batch), 0)
        found["peak"] = (live.peak - on_the_host, expected.peak)
        parts, ranks, replicas = family.parts(config), groups.tensor_parallel_size, groups.data_parallel_size
        if groups.context_parallel_size > 1:
            return found  # its traffic is counted over gloo in test_bench_parallel.py
        if ranks > 1:
            kept = with_recomputation(config, False)
            traffic = sum((tensor_traffic(kept, part) for part in parts), Traffic())
            found["tensor-parallel traffic"] = (sent.bytes * (ranks - 1) / ranks, traffic.bytes)
        else:
            traffic = data_traffic(config, parts, replicas, micro_batches(config, replicas))
            found["data-parallel traffic"] = (reduced.bytes * (replicas - 1) / replicas, traffic.bytes)
        return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensor", "sequence", "context", "recompute", "accumulation"),
    [(1, False, 1, False, 2), (2, True, 1, True, 1), (1, False, 2, False, 1), (2, True, 2, True, 1)],
)
def test_memory_of_paper_2b(tensor, sequence, context, recompute, accumulation):
    replicas = 8
    layers = (
        [] if tensor * context == 1 else ["model.dit.num_layers=8"]
    )  # one like the other: once with all of them is enough
    overrides = [
        *layers,
        f"parallel.tensor_parallel_size={tensor}",
        f"parallel.sequence_parallel={sequence}",
        f"parallel.context_parallel_size={context}",
        f"training.activation_checkpointing={recompute}",
        "training.micro_batch_size=2",
        f"training.global_batch_size={2 * accumulation * replicas}",
    ]
    (found,) = run_ranks(fake_paper_2b, 1, "paper-2b", overrides, tensor * context * replicas)
    check_plan(f"paper-2b, TP {tensor}, SP {sequence}, CP {context}, recompute {recompute}", found)


def check_plan(what: str, found: dict[str, tuple[float, float]]) -> None:
    for name, (measured, estimated) in found.items():
        report(f"{what}, {name}", measured, estimated)
        tolerance = 0.1 if name.startswith(("activations", "peak")) else 0.01
        assert estimated == pytest.approx(measured, rel=tolerance), name


# Which samples Plaid tells a first estimate, and which are cut, is in the values of a batch, which fake ones have not.
PLAID = ["objective.self_conditioning=0", "objective.cut_share=0"]


@pytest.mark.parametrize("layers", [2, pytest.param(24, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("autoregressive", []),
        pytest.param("masked-diffusion", [], marks=pytest.mark.slow),
        ("masked-diffusion", ["model.block_size=16"]),
        ("plaid", PLAID),
    ],
)
def test_memory_of_the_baselines_of_paper_2b(family, own, layers):
    """A block is like the other: what stands beside them has its full share in a model of two."""
    sizes = [f"model.transformer.num_layers={layers}", "training.micro_batch_size=2", "training.global_batch_size=32"]
    (found,) = run_ranks(fake_paper_2b, 1, f"paper-2b-{family}", [*sizes, *own], 8)
    check_plan(f"{family} {' '.join(own)}, {layers} blocks", found)


# ---- memory: small runs on the CPU, really trained ------------------------------------------------------------------

SMALL = [
    "model.dit.num_layers=2",
    "model.vocab_size=6000",
    "model.dit.hidden_size=256",
    "model.dit.head_dim=64",
    "model.dit.rotary_dim=48",
    "training.global_batch_size=16",
    "training.micro_batch_size=4",
    "training.vae_update.from_scratch=true",
    "parallel.reduce_bucket_size=500000",
    "parallel.overlap_communication=false",
]


def peaks(cases: list[list[str]]) -> list[tuple[float, float]]:
    """(measured, estimated) peak of the second optimiser step of each case, on this rank."""
    from cola_megatron.training.engine import Engine

    found = []
    for overrides in cases:
        config = load_config("tiny", [*SMALL, *overrides])
        parallel = config.parallel
        groups = initialize_parallel(
            parallel.tensor_parallel_size,
            parallel.sequence_parallel,
            pipeline_parallel_size=parallel.pipeline_parallel_size,
        )
        split = pipeline_split(config, groups.data_parallel_size)
        batches = itertools.repeat(random_batch(config, range(config.training.micro_batch_size)))
        with LiveMemory() as live:
            model = Cola(config, groups, split if len(split) > 1 else None)
            initialize_parameters(model, 0, groups)
            engine = Engine(model, config, groups)
            engine.step(batches, 0)
            live.peak = 0
            engine.step(batches, 1)
        expected = estimate(config, groups.data_parallel_size)[groups.pipeline_parallel_rank]
        found.append((live.peak, expected.peak + expected.states.host))  # here the host is the device
        del model, engine
        gc.collect()
    return found


def check_peaks(world_size: int, cases: list[list[str]]) -> None:
    for rank, found in enumerate(run_ranks(peaks, world_size, cases)):
        for case, (measured, estimated) in zip(cases, found, strict=True):
            report(f"rank {rank} of {world_size}, {' '.join(case)}", measured, estimated)
            assert estimated == pytest.approx(measured, rel=0.15), case


BF16, RECOMPUTED = "training.precision=bf16", "training.activation_checkpointing=true"
EXACT = "parallel.gradient_reduction=fp32"
HALF = "training.global_batch_size=8"


@pytest.mark.parametrize(
    ("zero_stage", "overrides"),
    [
        (0, []),
        (1, [BF16]),
        (2, [BF16, EXACT]),
        (3, [BF16, RECOMPUTED]),
        (1, [BF16, "parallel.offload_optimizer=true"]),
        # Each stage and each option is above; these are the other pairs.
        pytest.param(1, [RECOMPUTED], marks=pytest.mark.slow),
        pytest.param(2, [BF16], marks=pytest.mark.slow),
        pytest.param(1, [BF16, EXACT], marks=pytest.mark.slow),
        pytest.param(3, [BF16, EXACT], marks=pytest.mark.slow),
    ],
)
def test_memory_of_replicas(zero_stage, overrides):
    check_peaks(2, [[f"parallel.zero_stage={zero_stage}", *overrides]])


def test_memory_under_tensor_parallelism():
    two = "parallel.tensor_parallel_size=2"
    # Half of the replicas' batch: two micro-batches here, too.
    check_peaks(2, [[two, HALF], [two, HALF, "parallel.sequence_parallel=true", BF16]])


def test_memory_of_pipeline_stages():
    check_peaks(2, [["parallel.pipeline_parallel_size=2", BF16]])


def allocated_and_followed() -> tuple[int, int]:
    """Peak of a training step by torch's allocator and by `LiveMemory`."""
    from cola_megatron.training.engine import Engine

    config, groups = load_config("tiny", SMALL), initialize_parallel()
    batches = itertools.repeat(random_batch(config, range(config.training.micro_batch_size)))
    with torch.profiler.profile(profile_memory=True) as profile, LiveMemory() as live:
        model = Cola(config, groups)
        initialize_parameters(model, 0, groups)
        Engine(model, config, groups).step(batches, 0)
    events = profile.profiler.kineto_results.events()
    changes = [
        event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()) if event.name() == "[memory]"
    ]
    return max(itertools.accumulate(changes)), live.peak


def test_what_is_followed_is_what_is_allocated():
    ((allocated, followed),) = run_ranks(allocated_and_followed, 1)
    report("allocator against tracker", allocated, followed)
    assert followed == pytest.approx(allocated, rel=0.02)
