"""Checkpoints belong to no layout: saved under any, resumed under any other."""

import dataclasses
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cola_megatron.checkpoint.errors import CheckpointError
from cola_megatron.checkpoint.find import newest_checkpoint
from cola_megatron.checkpoint.load import load_optimizer, load_weights, read_weights
from cola_megatron.checkpoint.reshard import reshard
from cola_megatron.checkpoint.sharded_tensors import StoredTensors
from cola_megatron.checkpoint.state_file import read_state
from cola_megatron.checkpoint.writer import save_checkpoint
from cola_megatron.config import RunConfig, load_config
from cola_megatron.errors import UserError
from cola_megatron.parallel import initialize_parameters
from cola_megatron.training.build_model import build_model, initialize_run
from cola_megatron.training.engine import Engine
from cola_megatron.training.loop import train
from tests.ranks import run_ranks
from tests.support import TINY, make_text, prepared
from tests.test_training import curve

VOCABULARY = 301
"""Odd, so that two tensor-parallel ranks need a padding row in the embedding or in the head."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A job: how many processes, cut how, in which micro-batches."""

    processes: int = 1
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    sequence_parallel: bool = False
    zero_stage: int = 1
    offload_optimizer: bool = False
    micro_batch_size: int = 4

    @property
    def overrides(self) -> list[str]:
        values = {key: value for key, value in dataclasses.asdict(self).items() if key != "processes"}
        micro_batch_size = values.pop("micro_batch_size")
        parallel = [f"parallel.{key}={json.dumps(value)}" for key, value in values.items()]
        return [*parallel, f"training.micro_batch_size={micro_batch_size}"]


ALONE = Layout()
ALONE_WITHOUT_ZERO = Layout(zero_stage=0, micro_batch_size=8)
TENSOR = Layout(2, tensor_parallel_size=2)
SEQUENCE = Layout(2, tensor_parallel_size=2, sequence_parallel=True, micro_batch_size=8)
DATA_ZERO_0 = Layout(2, zero_stage=0)
DATA_ZERO_1 = Layout(2, zero_stage=1)
DATA_ZERO_2 = Layout(2, zero_stage=2, micro_batch_size=2)
DATA_ZERO_3 = Layout(2, zero_stage=3)
OFFLOADED = Layout(2, zero_stage=2, offload_optimizer=True)
STAGES = Layout(2, pipeline_parallel_size=2)
STAGES_TENSOR = Layout(4, pipeline_parallel_size=2, tensor_parallel_size=2)
TENSOR_DATA = Layout(4, tensor_parallel_size=2)

FLOAT32 = ("training.precision=fp32",)
BFLOAT16 = ("training.precision=bf16",)
INTERVAL = (
    "training.vae_update.mode=interval",
    "training.vae_update.joint_steps=1",
    "training.vae_update.frozen_steps=2",
)
STEPS = 4
HALF_WAY = "training.stop_after=2"
"""Past the warm-up, and in the middle of the frozen steps of `INTERVAL`."""

PAIRS = [
    (FLOAT32, ALONE, TENSOR),
    (FLOAT32, SEQUENCE, DATA_ZERO_2),
    (FLOAT32, DATA_ZERO_3, ALONE_WITHOUT_ZERO),
    (FLOAT32, DATA_ZERO_0, STAGES),
    (FLOAT32, TENSOR_DATA, DATA_ZERO_3),
    (BFLOAT16, ALONE, DATA_ZERO_2),
    (BFLOAT16, DATA_ZERO_1, DATA_ZERO_3),
    (INTERVAL, ALONE_WITHOUT_ZERO, DATA_ZERO_2),
]

Start = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """`start(name, *overrides)`: a stage-2 config with trained, frozen (reference) and padded parameters."""
    folder = tmp_path_factory.mktemp("layouts")
    make_text(folder / "text.jsonl", documents=60)
    shards = prepared(folder / "shards", [folder / "text.jsonl"], vocab_size=VOCABULARY)
    common = [*TINY, f"model.vocab_size={VOCABULARY}", f"data.path={shards}", f"runs_folder={folder / 'runs'}"]
    common.append(f"training.steps={STEPS}")
    first = load_config("tiny", [*common, "stage=1", "name=first", "training.steps=1"])
    train(first, progress=False)
    joint = ["training.vae_update.from_scratch=false", f"training.stage_one={first.run_folder}"]
    return lambda name, *overrides: load_config("tiny", [*common, "stage=2", f"name={name}", *joint, *overrides])


@pytest.fixture(scope="module")
def uninterrupted(start: Start) -> Callable[[tuple[str, ...]], RunConfig]:
    """All steps in one process, once for each set of overrides."""
    done: dict[tuple[str, ...], RunConfig] = {}

    def run(overrides: tuple[str, ...]) -> RunConfig:
        if overrides not in done:
            done[overrides] = start(f"straight{len(done)}", *overrides, *ALONE.overrides)
            train(done[overrides], progress=False)
        return done[overrides]

    return run


@pytest.fixture(scope="module")
def stopped(start: Start) -> Callable[[tuple[str, ...], Layout], RunConfig]:
    """Half of the steps under a layout, once for each."""
    done: dict[tuple, RunConfig] = {}

    def run(overrides: tuple[str, ...], layout: Layout) -> RunConfig:
        key = (overrides, layout)
        if key not in done:
            done[key] = start(f"stopped{len(done)}", *overrides, *layout.overrides, HALF_WAY)
            run_layout(train, layout, done[key], False)
        return done[key]

    return run


def run_layout(function: Callable, layout: Layout, *arguments) -> None:
    if layout.processes == 1:
        function(*arguments)
    else:
        run_ranks(function, layout.processes, *arguments)


def copied(run: RunConfig, name: str, layout: Layout) -> RunConfig:
    """The config of another run, under another layout, that begins with all that is in the folder of `run`."""
    training = run.training.model_copy(update={"stop_after": None, "micro_batch_size": layout.micro_batch_size})
    parallel = {
        key: value for key, value in dataclasses.asdict(layout).items() if key in type(run.parallel).model_fields
    }
    other = run.model_copy(
        update={"name": name, "training": training, "parallel": run.parallel.model_copy(update=parallel)}
    )
    shutil.rmtree(other.run_folder, ignore_errors=True)
    shutil.copytree(run.run_folder, other.run_folder)
    return other


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights, moments and frozen networks, whole."""
    stored = StoredTensors(checkpoint / "tensors")
    return {name: stored.read(name) for name in stored.shapes}


def assert_same_tensors(first: Path, second: Path) -> None:
    expected, found = tensors(first), tensors(second)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


@pytest.mark.parametrize(("overrides", "first", "second"), PAIRS)
def test_a_checkpoint_resumes_under_another_layout(uninterrupted, stopped, overrides, first, second):
    straight = uninterrupted(overrides)
    for source, target in ((first, second), (second, first)):
        saved = stopped(overrides, source)
        resumed = copied(saved, "resumed", target)
        run_layout(train, target, resumed, False)
        # float32 sums in another order: 4e-7 was seen; bfloat16 has 8 bits of mantissa: 5e-3 was seen.
        # Another sample, or moments left out, would show in the first two digits.
        tolerance = 0.02 if overrides is BFLOAT16 else 1e-5
        for expected, found in zip(curve(straight), curve(resumed), strict=True):
            assert found == pytest.approx(expected, rel=tolerance)
        assert read_state(newest_checkpoint(resumed.run_folder))["samples_seen"] == STEPS * 8
        if overrides is not BFLOAT16:
            bound = 0.05 * straight.training.optimizer.learning_rate * STEPS
            expected, found = (read_weights(newest_checkpoint(run.run_folder))[1] for run in (straight, resumed))
            for name, value in expected.items():
                assert (found[name] - value).abs().max() < bound, name


@pytest.mark.parametrize(("overrides", "layout"), [(FLOAT32, SEQUENCE), (BFLOAT16, DATA_ZERO_3), (FLOAT32, OFFLOADED)])
def test_under_the_same_layout_resuming_is_bit_identical(start, stopped, overrides, layout):
    straight = start("straight_in_layout", *overrides, *layout.overrides)
    shutil.rmtree(straight.run_folder, ignore_errors=True)
    resumed = copied(stopped(overrides, layout), "resumed_in_layout", layout)
    for config in (straight, resumed):
        run_layout(train, layout, config, False)
    assert curve(resumed) == curve(straight)
    assert_same_tensors(newest_checkpoint(straight.run_folder), newest_checkpoint(resumed.run_folder))


def load_and_save(config: RunConfig, again: RunConfig) -> None:
    """Saves what an engine loaded, without a step between, into the run folder of `again`."""
    checkpoint = newest_checkpoint(config.run_folder)
    groups = initialize_run(config)
    model = build_model(config, groups)
    load_weights(model, checkpoint, groups)
    engine = Engine(model.to(groups.device), config, groups)
    load_optimizer(engine, checkpoint)
    engine.config = again
    save_checkpoint(engine, STEPS // 2, "", groups)


@pytest.mark.parametrize(
    ("overrides", "layouts"),
    [
        (
            FLOAT32,
            (TENSOR, SEQUENCE, DATA_ZERO_0, STAGES, TENSOR_DATA, DATA_ZERO_3, DATA_ZERO_2, OFFLOADED, DATA_ZERO_1),
        ),
        (BFLOAT16, (DATA_ZERO_1, STAGES_TENSOR, DATA_ZERO_3, DATA_ZERO_2)),
    ],
)
def test_what_is_stored_goes_through_every_layout_without_losing_a_bit(stopped, overrides, layouts):
    first = stopped(overrides, ALONE)
    saved = first
    for number, layout in enumerate(layouts):
        held = copied(saved, f"held{number % 2}", layout)
        saved = held.model_copy(update={"name": "held_again"})
        run_layout(load_and_save, layout, held, saved)
    assert_same_tensors(newest_checkpoint(first.run_folder), newest_checkpoint(saved.run_folder))


def test_frozen_networks_stay_exact_in_bf16_under_every_layout(start):
    """They have no master copy: what is saved must not be what is computed with."""
    run = start("frozen", "training.precision=bf16", "training.vae_update.mode=frozen", *TENSOR.overrides)
    run_layout(train, TENSOR, run.model_copy(update={"training": run.training.model_copy(update={"stop_after": 1})}))
    moved = copied(run, "frozen_moved", DATA_ZERO_3)
    run_layout(train, DATA_ZERO_3, moved)
    _, began = read_weights(newest_checkpoint(run.training.stage_one))
    _, ended = read_weights(newest_checkpoint(moved.run_folder))
    assert any(not torch.equal(value, value.bfloat16().float()) for value in began.values())
    for name, value in began.items():
        assert torch.equal(value, ended[name]), name


def save_where_one_rank_has_no_room(config: RunConfig) -> str:
    """What each rank is told when the files of the second may not grow."""
    groups = initialize_run(config)
    model = build_model(config, groups)
    initialize_parameters(model, config.seed, groups)
    engine = Engine(model.to(groups.device), config, groups)
    if groups.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    with pytest.raises(CheckpointError) as refusal:
        save_checkpoint(engine, 0, "", groups)
    return str(refusal.value)


def test_every_rank_hears_of_a_save_that_failed_on_one(start):
    config = start("no_room", *DATA_ZERO_1.overrides)
    first, second = run_ranks(save_where_one_rank_has_no_room, 2, config)
    assert first == second
    assert "could not be written" in first and "File too large" in first and "\n" not in first
    assert newest_checkpoint(config.run_folder) is None


def resume_from_damage(config: RunConfig) -> str:
    with pytest.raises(CheckpointError) as refusal:
        train(config, progress=False)
    return str(refusal.value)


def test_a_flipped_bit_in_one_rank_s_part_stops_every_rank(stopped):
    """Same size, so only its checksum tells; the second rank alone reads the last rows of a tensor."""
    config = copied(stopped(FLOAT32, TENSOR), "damaged", TENSOR)
    path = newest_checkpoint(config.run_folder) / "tensors" / "rank_00001_000.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    first, second = run_ranks(resume_from_damage, 2, config)
    assert first == second and f"{path} is missing or damaged" in first and "delete" in first


def test_a_resharded_checkpoint_holds_the_same_in_even_parts_and_resumes(stopped, tmp_path):
    saved = stopped(FLOAT32, TENSOR)
    straight, moved = copied(saved, "unmoved", ALONE), copied(saved, "moved", ALONE)
    train(straight, progress=False)
    original = newest_checkpoint(saved.run_folder)
    shutil.rmtree(newest_checkpoint(moved.run_folder))
    output = reshard(saved.run_folder, moved.run_folder / "checkpoints" / original.name, ranks=3, progress=False)
    assert_same_tensors(original, output)
    sizes = [path.stat().st_size for path in sorted((output / "tensors").glob("rank_*.safetensors"))]
    assert len(sizes) == 3 and max(sizes) < 1.1 * min(sizes)
    train(moved, progress=False)
    assert_same_tensors(newest_checkpoint(straight.run_folder), newest_checkpoint(moved.run_folder))
    with pytest.raises(UserError, match="exists; give a new folder"):
        reshard(saved.run_folder, output, ranks=1, progress=False)
