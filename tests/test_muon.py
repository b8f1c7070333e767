"""Muon: the update itself, what it updates, and that every layout and every resume computes the same."""

import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cola_megatron.checkpoint.find import newest_checkpoint
from cola_megatron.config import ConfigError, load_config
from cola_megatron.families import family_of
from cola_megatron.parallel import initialize_parallel
from cola_megatron.parallel.matrix_exchange import HeldMatrix, MatrixExchange
from cola_megatron.parallel.muon import MuonAdamW, matched_update, orthogonalized
from cola_megatron.parallel.parameters import marks_of
from cola_megatron.planning.memory import model_states
from cola_megatron.training.loop import train
from tests.ranks import run_ranks
from tests.support import TINY, make_text, prepared
from tests.test_checkpoint_layouts import assert_same_tensors, tensors
from tests.test_layouts import FP32_CURVE, LAYOUTS, relative, tiny_config, train_steps, whole_loss
from tests.test_training import curve

MUON = ("training.optimizer.name=muon", "training.optimizer.learning_rate=1e-3")
NEAR_ONE = (0.65, 1.25)  # what the five steps leave of singular values above 0.01 of the norm


def matrix_of(shape: tuple[int, int]) -> torch.Tensor:
    """Singular values from 0.1 to 1, in float64."""
    generator = torch.Generator().manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    return left @ torch.linspace(0.1, 1.0, min(shape), dtype=torch.float64).diag() @ right


# ---- the update -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 24), (24, 60), (60, 24)])
def test_the_singular_values_are_brought_near_one_and_the_directions_stay(shape):
    matrix = matrix_of(shape)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = left.T @ orthogonalized(matrix) @ right.T
    assert NEAR_ONE[0] < found.diag().min() and found.diag().max() < NEAR_ONE[1]
    assert (found - found.diag().diag()).abs().max() < 1e-12


def test_a_gradient_of_zeros_moves_nothing():
    assert not orthogonalized(torch.zeros(4, 6)).any()


def test_an_update_has_the_root_mean_square_of_adamw_whatever_the_shape():
    for shape in ((64, 64), (64, 512), (512, 64)):
        update = matched_update(matrix_of(shape), None)
        assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.15)


def test_each_fused_projection_is_orthogonalised_by_itself():
    """Two groups of rows: two of queries, one of a key, one of a value; the value's gradient is a thousand times."""
    rows, generator = (2, 1, 1), torch.Generator().manual_seed(2)
    q, k, v = torch.randn(4, 6, generator=generator), torch.randn(2, 6, generator=generator), torch.randn(2, 6)
    fused = torch.cat([torch.cat((q[2 * i : 2 * i + 2], k[i : i + 1], 1000 * v[i : i + 1])) for i in range(2)])
    found = matched_update(fused, rows).unflatten(0, (2, 4))
    for part, own in ((found[:, :2], q), (found[:, 2:3], k), (found[:, 3:], 1000 * v)):
        torch.testing.assert_close(part.flatten(0, 1), matched_update(own, None))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_steps_are_those_of_torchs_muon_at_the_same_matching():
    """Which computes in bfloat16; the factor is multiplied in there, one rounding of at most 2^-9 of each element."""
    start, generator = torch.randn(12, 20, generator=torch.Generator().manual_seed(3)), torch.Generator().manual_seed(4)
    mine, torchs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    group = {"params": [mine], "muon": True, "lr": 0.02, "weight_decay": 0.1}
    optimizer = MuonAdamW([group], momentum=0.9, dtype=torch.bfloat16)
    held = HeldMatrix(tuple(start.shape), None, None, 0, start.numel(), 0)
    optimizer.share({id(mine): MatrixExchange([held], initialize_parallel())})
    other = torch.optim.Muon([torchs], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        gradient = torch.randn(start.shape, generator=generator)
        mine.grad, torchs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        other.step()
    moved = (torchs - start).norm()
    assert (mine - torchs).norm() < 2**-8 * moved
    assert moved > 0.1


# ---- what it updates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset", ["tiny", "tiny-autoregressive", "tiny-masked-diffusion", "tiny-plaid", "small", "paper-2b"]
)
def test_it_updates_the_matrices_of_the_layers_and_the_plan_knows_them(preset):
    config = load_config(preset, ["training.optimizer.name=muon"])
    with torch.device("meta"):
        model = family_of(config).build(config, initialize_parallel())
    trained = {name: each for name, each in model.named_parameters() if not name.startswith("reference.")}
    updated = {name: each for name, each in trained.items() if marks_of(each).role.muon_rate is not None}
    assert updated and all(each.dim() == 2 for each in updated.values())
    words = {"embed", "head", "norm", "shift", "gate", "time", "schedule", "bias"}
    blocks = [name for name in updated if "blocks." in name]
    assert len(blocks) > 0.5 * len(updated)
    assert not [name for name in updated if words & set(name.replace("_", ".").split("."))]
    assert {name.split(".blocks.")[1].split(".", 1)[1] for name in blocks} <= {
        "attention.qkv.weight",
        "attention.output.weight",
        "ffn.input.weight",
        "ffn.output.weight",
    }
    parts = [part for part in family_of(config).parts(config) if part.label != "reference"]
    assert sum(part.layer_parameters for part in parts) == sum(each.numel() for each in updated.values())


def test_the_plan_counts_one_moment_where_muon_updates():
    muon = load_config("tiny", ["stage=1", "training.optimizer.name=muon", "training.precision=bf16"])
    adamw = load_config("tiny", ["stage=1", "training.precision=bf16"])
    parts = family_of(muon).parts(muon)
    saved = model_states(adamw, parts, 2).optimizer - model_states(muon, parts, 2).optimizer
    assert saved == 4 * sum(part.layer_parameters for part in parts) / 2


def test_the_flops_of_the_iteration_are_those_that_torch_runs():
    config = load_config("tiny-autoregressive", ["training.optimizer.name=muon"])
    with torch.device("meta"):
        model = family_of(config).build(config, initialize_parallel())
    with FlopCounterMode(display=False) as counter:
        for parameter in model.parameters():
            if (marks := marks_of(parameter)).role.muon_rate is not None:
                matched_update(parameter.detach(), marks.fused_rows)
    assert counter.get_total_flops() == sum(part.newton_schulz_flops for part in family_of(config).parts(config))


# ---- layouts and resuming -------------------------------------------------------------------------------------------


EVERY_DAY = ("DP 2, ZeRO 1", "TP 2")
ALL_LAYOUTS = {**LAYOUTS, "CP 2 x DP 2": (4, ["parallel.context_parallel_size=2"])}


@pytest.mark.parametrize(
    "layout", [name if name in EVERY_DAY else pytest.param(name, marks=pytest.mark.slow) for name in ALL_LAYOUTS]
)
def test_a_layout_follows_the_curve_of_one_process(layout):
    ranks, overrides = ALL_LAYOUTS[layout]
    common = [*whole_loss(2), *MUON]
    expected = run_ranks(train_steps, 1, tiny_config(common), 4)[0]["metrics"]
    found = run_ranks(train_steps, ranks, tiny_config([*common, *overrides]), 4)[0]["metrics"]
    for mine, one in zip(found, expected, strict=True):
        assert relative(mine["loss"], one["loss"]) <= FP32_CURVE
        assert relative(mine["gradient_norm"], one["gradient_norm"]) <= FP32_CURVE


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory):
    """`start(name, *overrides)`: a config of four steps of stage 1 on prepared text."""
    folder = tmp_path_factory.mktemp("muon")
    make_text(folder / "text.jsonl", documents=60)
    shards = prepared(folder / "shards", [folder / "text.jsonl"], vocab_size=301)
    common = [*TINY, "model.vocab_size=301", f"data.path={shards}", f"runs_folder={folder / 'runs'}", "stage=1"]
    return lambda name, *overrides: load_config("tiny", [*common, f"name={name}", "training.steps=4", *overrides])


def continued(start, name: str, saved: Path, *overrides: str):
    config = start(name, *overrides)
    shutil.copytree(saved, config.run_folder)
    return config


def test_resuming_is_bit_identical_and_another_optimiser_is_refused(start):
    straight, half = start("straight", *MUON), start("half", *MUON, "training.stop_after=2")
    train(straight, progress=False)
    train(half, progress=False)
    resumed = continued(start, "resumed", half.run_folder, *MUON)
    train(resumed, progress=False)
    assert curve(resumed) == curve(straight)
    assert_same_tensors(newest_checkpoint(straight.run_folder), newest_checkpoint(resumed.run_folder))
    kept = tensors(newest_checkpoint(straight.run_folder))
    assert "momentum/vae.encoder.blocks.0.ffn.input.weight" in kept
    assert "exp_avg/vae.encoder.blocks.0.ffn.input.weight" not in kept and "exp_avg/vae.encoder.head.weight" in kept
    fork = start("fork", f"training.start_from={half.run_folder}")
    with pytest.raises(ConfigError, match=r"has the state of muon, and training\.optimizer\.name=adamw"):
        train(fork, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (2, ["parallel.zero_stage=1"]),
        (2, ["parallel.zero_stage=2"]),
        (2, ["parallel.zero_stage=3"]),
        (2, ["parallel.tensor_parallel_size=2"]),
    ],
)
def test_a_layout_resumes_what_one_process_saved_and_itself_bit_for_bit(start, precision, ranks, overrides):
    common, name = [*MUON, f"training.precision={precision}"], f"{precision}{'_'.join(overrides)}".replace("=", "_")
    one, half = start(f"{name}_one", *common), start(f"{name}_half", *common, "training.stop_after=2")
    train(one, progress=False)
    train(half, progress=False)
    moved = continued(start, f"{name}_moved", half.run_folder, *common, *overrides)
    run_ranks(train, ranks, moved, False)
    tolerance = 0.02 if precision == "bf16" else 1e-5
    for expected, found in zip(curve(one), curve(moved), strict=True):
        assert found == pytest.approx(expected, rel=tolerance)
    straight = start(f"{name}_straight", *common, *overrides)
    begun = start(f"{name}_begun", *common, *overrides, "training.stop_after=2")
    run_ranks(train, ranks, straight, False)
    run_ranks(train, ranks, begun, False)
    resumed = continued(start, f"{name}_resumed", begun.run_folder, *common, *overrides)
    run_ranks(train, ranks, resumed, False)
    assert_same_tensors(newest_checkpoint(straight.run_folder), newest_checkpoint(resumed.run_folder))
