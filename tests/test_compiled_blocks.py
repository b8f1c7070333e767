"""Compiled transformer layers: the same numbers, whole graphs, and no compilation after the first step."""

import signal
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from cola_megatron.config import ConfigError, RunConfig, load_config
from cola_megatron.families.cola.chain import Cola
from cola_megatron.models.compiled_blocks import compile_blocks, compiles, start_compilers, uncompiled
from cola_megatron.parallel import initialize_parameters
from cola_megatron.training.build_model import build_model, initialize_run
from cola_megatron.training.stop_signals import STOP_SIGNALS
from tests.ranks import run_ranks
from tests.support import perturbed, random_batch

# The graphs are traced and differentiated by the compiler and run by torch's own kernels: what the compiler may get
# wrong here is what it captures; what its kernels round shows on a GPU (tools/gpu_check.py).
BACKEND = "aot_eager"


def model_of(config: RunConfig) -> Cola:
    groups = initialize_run(config)
    model = build_model(config, groups)
    initialize_parameters(model, config.seed, groups)
    return perturbed(model)


def losses_and_gradients(model: Cola, seed: int, train_vae: bool = True) -> list[torch.Tensor]:
    terms = model(random_batch(model.config, range(seed, seed + 3)), train_vae=train_vae)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(terms["loss"], trained, allow_unused=True)
    return [*terms.values(), *(gradient for gradient in gradients if gradient is not None)]


def compare_with_plain(config: RunConfig, whole_graphs: bool = True) -> int:
    """How many graphs there are after passes of every kind, in which losses and gradients were the plain ones."""
    counters.clear()
    torch._dynamo.reset()
    model, compiled = model_of(config), model_of(config)
    graphs = CompileCounterWithBackend(BACKEND)
    assert compile_blocks(compiled, graphs) == len(model.vae.encoder.blocks) * 3 + len(model.prior.blocks)
    passes = [(seed, train_vae) for seed in range(2) for train_vae in (True, False)]
    compiled_before = 0
    for seed, train_vae in passes:
        if (seed, train_vae) == (1, True):
            compiled_before = graphs.frame_count
        for ours, theirs in zip(
            losses_and_gradients(compiled, seed, train_vae), losses_and_gradients(model, seed, train_vae), strict=True
        ):
            # Sums over positions may be taken in another order.
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
        with uncompiled(), torch.no_grad():  # as a measurement does, with more samples than a step has
            compiled(random_batch(config, range(5)), train_vae=True)
    assert bool(counters["graph_break"]) != whole_graphs
    assert graphs.frame_count == compiled_before  # all of them in the first two passes
    return graphs.frame_count


# Text layers with and without gradients, those of encoder and decoder alike, and the layers of the prior.
GRAPHS = 4


@pytest.mark.parametrize("options", [[], ["training.activation_checkpointing=true"], ["data.document_attention=true"]])
def test_layers_are_whole_graphs_that_compute_the_same(tiny, options):
    config = tiny(2, "training.vae_update.from_scratch=false", "training.vae_update.mode=interval", *options)
    assert compare_with_plain(config) == GRAPHS


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true"],
        pytest.param(["parallel.context_parallel_size=2"], marks=pytest.mark.slow),
    ],
)
def test_on_ranks_that_share_layers_what_communicates_is_left_out(tiny, layout):
    config = tiny(2, "training.vae_update.from_scratch=false", "training.vae_update.mode=interval", *layout)
    first, second = run_ranks(compare_with_plain, 2, config, False)
    assert first == second > GRAPHS


def test_automatic_means_where_it_can_and_helps(tiny):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert compiles(tiny(2), cuda)
    assert not compiles(tiny(2), cpu)
    assert not compiles(tiny(2, "parallel.zero_stage=3"), cuda)
    assert compiles(tiny(2, "parallel.tensor_parallel_size=2"), cuda)
    assert compiles(tiny(2, "training.compile_blocks=always"), cpu)
    assert not compiles(tiny(2, "training.compile_blocks=never"), cuda)


def test_a_layout_in_which_layers_cannot_be_compiled_is_refused():
    with pytest.raises(ConfigError, match="use zero_stage=2, or compile_blocks=never"):
        load_config("tiny", ["stage=2", "training.compile_blocks=always", "parallel.zero_stage=3"])


def blocked_signals_of_the_compilers() -> int:
    """The mask of signals that the process which compiles for this one does not hear, as the system has it."""
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile

    config.compile_threads = 2  # on a machine of one core there would be no such process
    start_compilers(STOP_SIGNALS)
    pool = AsyncCompile.process_pool()
    status = Path(f"/proc/{pool.process.pid}/status").read_text()
    pool.shutdown()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
    return int(status.split("SigBlk:")[1].split()[0], 16)


def test_a_stop_signal_does_not_take_the_compilers_away():
    (blocked,) = run_ranks(blocked_signals_of_the_compilers, 1)
    assert all(blocked & 1 << number - 1 for number in STOP_SIGNALS)
