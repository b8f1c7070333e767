"""Weight gradients straight into their float32 sums, with a stand-in for apex's kernel, which needs a GPU."""

import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from cola_megatron.checkpoint.pieces import trained_pieces
from cola_megatron.config import ConfigError, RunConfig, load_config
from cola_megatron.layers.linear import ColumnLinear, RowLinear
from cola_megatron.models.compiled_blocks import compile_blocks
from cola_megatron.parallel import initialize_parameters, weight_gradients
from cola_megatron.parallel.weight_gradients import EXTENSION, fuses_weight_gradients
from cola_megatron.preflight import installation
from cola_megatron.preflight.check import Status
from cola_megatron.training.build_model import build_model, initialize_run
from cola_megatron.training.engine import Engine
from tests.ranks import run_ranks
from tests.support import TINY, package_in, random_batch
from tests.test_compiled_blocks import BACKEND, GRAPHS, model_of

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
calls = 0


def rounded(x_NI: torch.Tensor, gradient_NO: torch.Tensor, total_OI: torch.Tensor) -> None:
    """What happens without the kernel: the product in the type of its factors, then the sum."""
    global calls
    calls += 1
    total_OI.add_(gradient_NO.t().matmul(x_NI))


def exact(x_NI: torch.Tensor, gradient_NO: torch.Tensor, total_OI: torch.Tensor) -> None:
    """What the kernel computes: products and sum in float32."""
    global calls
    calls += 1
    total_OI.addmm_(gradient_NO.t().float(), x_NI.float())


def stand_in(kernel: Kernel) -> ModuleType:
    module = ModuleType(EXTENSION)
    module.__spec__ = importlib.machinery.ModuleSpec(EXTENSION, None)
    vars(module)["wgrad_gemm_accum_fp32"] = kernel
    return module


def install(kernel: Kernel) -> None:
    """As where apex is: importable, and imported by megatron-core."""
    from megatron.core.tensor_parallel import layers

    sys.modules[EXTENSION] = vars(layers)[EXTENSION] = stand_in(kernel)


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, EXTENSION, stand_in(exact))


def config_of(*overrides: str) -> RunConfig:
    own = ["stage=2", "training.precision=bf16", "training.vae_update.from_scratch=false"]
    return load_config("tiny", [*TINY, "training.micro_batch_size=2", *own, *overrides])


def gradients_and_losses(config: RunConfig, kernel: Kernel | None, steps: int = 2) -> tuple[list[dict], dict, int]:
    """Metrics of the steps, first moments after them by (name, offsets), and how often the kernel was called."""
    if kernel is not None:
        install(kernel)
    groups = initialize_run(config)
    model = build_model(config, groups)
    initialize_parameters(model, config.seed, groups)
    engine, metrics = Engine(model, config, groups), []
    for step in range(steps):
        size, replicas = config.training.micro_batch_size, groups.data_parallel_size
        starts = [
            (step * engine.accumulation + index) * size * replicas + groups.data_parallel_rank * size
            for index in range(engine.accumulation)
        ]
        metrics.append(engine.step((random_batch(config, range(s, s + size), step) for s in starts), step))
        assert all(parameter.grad is None for parameter in model.parameters())
    moments = {
        (piece.name, piece.offsets): piece.values.clone().numpy()
        for piece in trained_pieces(engine, steps)
        if piece.name.startswith("exp_avg/")
    }
    return metrics, moments, calls


TENSOR = ("parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true")


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ()),
        (2, TENSOR),
        pytest.param(2, (), marks=pytest.mark.slow),
        pytest.param(2, ("parallel.pipeline_parallel_size=2",), marks=pytest.mark.slow),
        pytest.param(2, ("parallel.context_parallel_size=2",), marks=pytest.mark.slow),
        pytest.param(1, ("training.activation_checkpointing=true",), marks=pytest.mark.slow),
        pytest.param(1, ("training.loss_chunk_tokens=16",), marks=pytest.mark.slow),
        pytest.param(1, ("training.vae_update.mode=frozen",), marks=pytest.mark.slow),
    ],
)
def test_sums_are_those_without_it_bit_for_bit_where_the_kernel_rounds_as_they_do(ranks, overrides):
    plain = run_ranks(gradients_and_losses, ranks, config_of("training.fused_weight_gradients=never", *overrides), None)
    fused = run_ranks(
        gradients_and_losses, ranks, config_of("training.fused_weight_gradients=always", *overrides), rounded
    )
    for (metrics, moments, none), (own_metrics, own_moments, called) in zip(plain, fused, strict=True):
        assert none == 0 and called > 0
        assert own_metrics == metrics
        assert own_moments.keys() == moments.keys()
        assert all((own_moments[name] == moment).all() for name, moment in moments.items())


def test_the_kernel_leaves_out_a_rounding_and_nothing_else():
    plain, _ = run_ranks(gradients_and_losses, 2, config_of("training.fused_weight_gradients=never"), None, 1)
    fused, _ = run_ranks(gradients_and_losses, 2, config_of("training.fused_weight_gradients=always"), exact, 1)
    assert fused[0][0]["loss"] == plain[0][0]["loss"]
    changed = 0
    for name, moment in plain[1].items():
        one, other = torch.from_numpy(fused[1][name]), torch.from_numpy(moment)
        # One rounding to bfloat16 of each micro-batch's gradient; micro-batches may cancel, hence twice its 2^-9.
        assert (one - other).norm() <= 2**-8 * other.norm(), name
        changed += not torch.equal(one, other)
    assert changed


@pytest.mark.parametrize("options", [[], ["training.activation_checkpointing=true"]])
def test_compiled_layers_stay_whole_graphs_and_add_to_the_same_sums(tiny, apex, options):
    config = tiny(2, "training.vae_update.from_scratch=false", *options)
    counters.clear()
    torch._dynamo.reset()
    model, compiled = model_of(config), model_of(config)
    totals = {}
    for name, module in compiled.named_modules():
        if isinstance(module, ColumnLinear | RowLinear) and module.weight.requires_grad:
            totals[f"{name}.weight"] = torch.zeros_like(module.weight)
            module.add_weight_gradients_to(totals[f"{name}.weight"])
    graphs = CompileCounterWithBackend(BACKEND)
    compile_blocks(compiled, graphs)
    for seed in range(2):
        for each in (model, compiled):
            each(random_batch(config, range(seed, seed + 3)), train_vae=True)["loss"].backward()
    assert not counters["graph_break"] and graphs.frame_count <= GRAPHS
    assert len(totals) > 20
    for (name, parameter), (_, own) in zip(model.named_parameters(), compiled.named_parameters(), strict=True):
        if parameter.grad is None:
            continue
        # Sums over positions may be taken in another order.
        assert (totals.get(name, own.grad) - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name
        assert name not in totals or own.grad is None


def test_automatic_means_where_it_is_there_and_can(apex):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert fuses_weight_gradients(config_of(), cuda)
    assert not fuses_weight_gradients(config_of(), cpu)
    assert not fuses_weight_gradients(config_of("parallel.zero_stage=2"), cuda)
    assert not fuses_weight_gradients(config_of("training.precision=fp32"), cuda)
    assert not fuses_weight_gradients(config_of("training.fused_weight_gradients=never"), cuda)
    assert fuses_weight_gradients(config_of("training.fused_weight_gradients=always"), cpu)


def test_without_apex_it_is_off_and_asking_for_it_is_one_line():
    assert not weight_gradients.is_available()
    assert not fuses_weight_gradients(config_of(), torch.device("cuda"))
    with pytest.raises(ConfigError, match="needs NVIDIA apex with fused_weight_gradient_mlp_cuda") as refusal:
        fuses_weight_gradients(config_of("training.fused_weight_gradients=always"), torch.device("cuda"))
    assert "\n" not in str(refusal.value)
    with pytest.raises(ConfigError, match=r"which there are with training\.precision=bf16 and parallel\.zero_stage=1"):
        config_of("training.fused_weight_gradients=always", "parallel.zero_stage=2")


@pytest.mark.parametrize(("built", "status"), [(True, Status.OK), (False, Status.WARNING)])
def test_the_doctor_says_whether_it_is_used(tmp_path, monkeypatch, built, status):
    (tmp_path / "apex" / "optimizers").mkdir(parents=True)
    for folder in ("apex", "apex/optimizers"):
        (tmp_path / folder / "__init__.py").write_text("")
    if built:
        (tmp_path / f"{EXTENSION}.py").write_text("")
    with package_in(tmp_path, "apex", monkeypatch):
        (found,) = (check for check in installation.installation_checks() if check.name == "NVIDIA apex")
    assert (found.status is status and "fused" in f"{found.value}{found.cure}") or "sums" in found.value
