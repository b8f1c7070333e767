"""Checkpoints that are written while training goes on, and damaged ones when a run resumes."""

import errno
import json
import os
import resource
import shutil
import signal
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from cola_megatron.checkpoint import folder as checkpoints_folder
from cola_megatron.checkpoint import writer as checkpoint_writer
from cola_megatron.checkpoint.errors import CheckpointError, DamagedCheckpoint
from cola_megatron.checkpoint.find import newest_checkpoint, require_checkpoint
from cola_megatron.checkpoint.load import read_weights
from cola_megatron.checkpoint.sharded_tensors import write_pieces
from cola_megatron.checkpoint.writer import Saved
from cola_megatron.config import RunConfig, load_config
from cola_megatron.records.metrics import read_metrics
from cola_megatron.training.loop import TrainingDiverged, train
from tests.ranks import ends_of_ranks, run_ranks
from tests.support import TINY, small_disk
from tests.test_checkpoint_layouts import assert_same_tensors
from tests.test_training import curve

EVERY_TWO = ["training.checkpoint.every=2", "training.checkpoint.keep_last=9"]


def checkpoints(config: RunConfig) -> list[str]:
    """The names in the checkpoints folder."""
    return sorted(path.name for path in (config.run_folder / "checkpoints").iterdir())


def steps_trained(config: RunConfig) -> int:
    """How many steps were logged so far; the file may be written meanwhile."""
    path = config.run_folder / "metrics.jsonl"
    return path.read_text().count('"train"') if path.exists() else 0


def run(config: RunConfig) -> None:
    train(config, progress=False)


def run_on(ranks: int, function: Callable, *arguments) -> None:
    if ranks == 1:
        function(*arguments)
    else:
        run_ranks(function, ranks, *arguments)


# ---- the copy ------------------------------------------------------------------------------------------------------


def run_with_late_writes(config: RunConfig) -> None:
    """Every write begins when training has gone on by a step, except for that of the last."""

    def write_late(folder: Path, *arguments):
        step, until = int(folder.parent.name[-8:]), time.monotonic() + 30
        while steps_trained(config) <= step < config.training.steps:
            assert time.monotonic() < until, "training waited for the write"
            time.sleep(0.005)
        return write_pieces(folder, *arguments)

    checkpoint_writer.write_pieces = write_late
    try:
        train(config, progress=False)
    finally:
        checkpoint_writer.write_pieces = write_pieces


LAYOUTS = {
    "without zero": (1, ["parallel.zero_stage=0"]),
    "offloaded": (1, ["parallel.zero_stage=2", "parallel.offload_optimizer=true", "training.precision=bf16"]),
    "zero 3": (2, ["parallel.zero_stage=3", "training.precision=bf16"]),
    "tensor": (2, ["parallel.tensor_parallel_size=2"]),
    "pipeline": (2, ["parallel.pipeline_parallel_size=2", "parallel.zero_stage=1"]),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "pipeline" else []) for name in LAYOUTS]
)
def test_what_is_written_late_is_the_state_of_its_step_and_resumes_bit_identically(tiny, name):
    ranks, overrides = LAYOUTS[name]
    overrides = [*EVERY_TWO, *overrides]
    straight = tiny(2, "name=straight", "training.checkpoint.asynchronous=false", *overrides)
    late = tiny(2, "name=late", *overrides)
    run_on(ranks, run, straight)
    run_on(ranks, run_with_late_writes, late)
    assert checkpoints(straight) == checkpoints(late) == ["step_00000002", "step_00000004", "step_00000006"]
    for checkpoint in checkpoints(straight):
        first, second = (config.run_folder / "checkpoints" / checkpoint for config in (straight, late))
        assert_same_tensors(first, second)
    for step in (4, 6):
        shutil.rmtree(late.run_folder / "checkpoints" / f"step_{step:08d}")
    run_on(ranks, run, late)
    assert curve(late) == curve(straight)
    assert_same_tensors(newest_checkpoint(straight.run_folder), newest_checkpoint(late.run_folder))


def test_a_save_says_what_it_took(tiny):
    config = tiny(1, *EVERY_TWO, "training.checkpoint.asynchronous=false")
    run(config)
    run(tiny(1, *EVERY_TWO, "training.steps=8"))
    saves = [record for record in read_metrics(config.run_folder / "metrics.jsonl") if record["kind"] == "checkpoint"]
    assert [record["step"] for record in saves] == [2, 4, 6, 8]
    files = (newest_checkpoint(config.run_folder) / "tensors").glob("*.safetensors")
    size = sum(path.stat().st_size for path in files)
    for record in saves:
        assert 0 < record["blocked"] < record["writing"] + 0.1 and 0 < record["writing"] < record["seconds"]
        assert 0.8 * size < record["bytes"] < size
    seconds = [record["seconds"] for record in read_metrics(config.run_folder / "metrics.jsonl")]
    assert seconds == sorted(seconds)  # the clock of the run, over both jobs


def test_what_a_diverging_run_had_saved_before_is_completed(tiny, monkeypatch):
    def write_slowly(*arguments):
        time.sleep(0.5)
        return write_pieces(*arguments)

    monkeypatch.setattr(checkpoint_writer, "write_pieces", write_slowly)
    config = tiny(1, "training.optimizer.learning_rate=1e30", "training.checkpoint.every=1")
    with pytest.raises(TrainingDiverged):
        run(config)
    assert newest_checkpoint(config.run_folder) is not None
    assert not [name for name in checkpoints(config) if name.startswith(".")]


# ---- kills and failures --------------------------------------------------------------------------------------------


def run_until_killed(config: RunConfig, moment: str) -> None:
    """Dies at a moment of the save after step 4."""

    def killing(function: Callable, when: Callable[..., bool]) -> Callable:
        def call(*arguments, **options):
            if when(*arguments):
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    def of_step_4(path: Path, *rest) -> bool:
        return "step_00000004" in str(path)

    if moment == "writing":
        # When the first of its files is complete, and training has gone on.
        def written(folder: Path, *arguments):
            pieces = write_pieces(folder, *arguments)
            if of_step_4(folder):
                time.sleep(0.2)
                os.kill(os.getpid(), signal.SIGKILL)
            return pieces

        checkpoint_writer.write_pieces = written
    elif moment == "index":
        checkpoint_writer.write_state = killing(checkpoint_writer.write_state, of_step_4)
    elif moment == "rename":
        checkpoint_writer.complete_folder = killing(checkpoint_writer.complete_folder, of_step_4)
    elif moment == "renamed":
        checkpoint_writer.prune = killing(
            checkpoint_writer.prune, lambda folder, kept: (folder / "checkpoints" / "step_00000004").exists()
        )
    elif moment == "removing":
        # In the middle of removing what step 4 makes superfluous: its state is still there, tensors are gone.
        def half(folder: Path) -> None:
            (folder / "tensors" / "index.json").unlink()
            os.kill(os.getpid(), signal.SIGKILL)

        checkpoints_folder.shutil.rmtree = half
    train(config, progress=False)


@pytest.mark.parametrize(
    ("moment", "ranks", "left"),
    [("writing", 1, 2), ("writing", 2, 2), ("index", 2, 2), ("rename", 1, 2), ("renamed", 1, 4), ("removing", 1, 4)],
)
def test_a_kill_at_any_moment_of_a_save_leaves_a_good_checkpoint(tiny, saved, moment, ranks, left):
    straight, _ = saved(ranks)
    overrides = ["training.checkpoint.every=2", "training.checkpoint.keep_last=1", f"parallel.zero_stage={ranks}"]
    killed = tiny(1, "name=killed", *overrides)
    ends = ends_of_ranks(run_until_killed, ranks, killed, moment)
    assert -signal.SIGKILL in [end.exit_code for end in ends]
    assert newest_checkpoint(killed.run_folder).name == f"step_{left:08d}"
    run_on(ranks, run, killed)
    assert checkpoints(killed) == ["step_00000006"]  # what the kill left is gone, nothing was moved aside
    assert curve(killed) == curve(straight)
    assert_same_tensors(newest_checkpoint(straight.run_folder), newest_checkpoint(killed.run_folder))


def run_without_room_on_the_second_rank(config: RunConfig) -> str:
    if int(os.environ["RANK"]) == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    with pytest.raises(CheckpointError) as failure:
        train(config, progress=False)
    return str(failure.value)


def test_a_write_that_fails_on_one_rank_ends_both_at_a_step_boundary_with_one_line(tiny):
    config = tiny(1, "parallel.zero_stage=1", "training.steps=500", *EVERY_TWO)
    first, second = run_ranks(run_without_room_on_the_second_rank, 2, config)
    assert first == second and "could not be written" in first and "File too large" in first and "\n" not in first
    assert newest_checkpoint(config.run_folder) is None and steps_trained(config) < 100


def run_without_finishing(config: RunConfig) -> str:
    def fail(*arguments) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    checkpoint_writer.write_state = fail
    with pytest.raises(CheckpointError) as failure:
        train(config, progress=False)
    return str(failure.value)


def test_a_save_that_the_main_process_cannot_finish_ends_all_ranks(tiny):
    config = tiny(1, "parallel.zero_stage=1", "training.steps=500", *EVERY_TWO)
    first, second = run_ranks(run_without_finishing, 2, config)
    assert first == second and "could not be written" in first and os.strerror(errno.EIO) in first
    assert newest_checkpoint(config.run_folder) is None and steps_trained(config) < 100


Usage = namedtuple("Usage", "total used free")


def test_a_disk_that_fills_up_during_the_write_is_one_line_and_the_previous_checkpoint_stays(
    tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoints_folder.shutil, "disk_usage", lambda folder: Usage(10**12, 0, 10**12))
    with small_disk(tmp_path / "disk", kilobytes=2000) as disk:
        config = tiny(1, "training.checkpoint.every=1", "training.checkpoint.keep_last=9")
        config.run_folder.mkdir(parents=True)
        (config.run_folder / "checkpoints").symlink_to(disk)
        with pytest.raises(CheckpointError, match=os.strerror(errno.ENOSPC)) as failure:
            run(config)
        assert "\n" not in str(failure.value) and "could not be written" in str(failure.value)
        read_weights(newest_checkpoint(config.run_folder))
        assert shutil.os.statvfs(disk).f_bavail > 0  # the part that did not fit was removed at once


def test_a_save_that_does_not_fit_is_refused_before_anything_is_written(tiny, monkeypatch):
    monkeypatch.setattr(checkpoints_folder.shutil, "disk_usage", lambda folder: Usage(10**12, 0, 10_000))
    config = tiny(1, "training.checkpoint.every=1")
    with pytest.raises(CheckpointError, match=r"it takes [\d.]+ GB and 1e-05 GB are free.*keep_last") as refusal:
        run(config)
    assert "\n" not in str(refusal.value) and checkpoints(config) == []


def test_what_kills_left_is_removed_before_space_is_counted(tiny, tmp_path):
    with small_disk(tmp_path / "disk", kilobytes=2000) as disk:
        config = tiny(1, f"runs_folder={disk}", "training.steps=1")
        leftover = config.run_folder / "checkpoints" / ".saving_step_00000099"
        leftover.mkdir(parents=True)
        (leftover / "rank_00000_000.safetensors").write_bytes(bytes(1_900_000))
        run(config)
        assert checkpoints(config) == ["step_00000001"]


EVERY_STEP = ["training.checkpoint.every=1", "training.checkpoint.keep_last=1"]


def test_what_cannot_be_removed_is_left_with_a_warning_and_training_goes_on(tiny, monkeypatch, caplog):
    """As a file of an old checkpoint that another node holds open: its folder cannot go while that is so."""
    rmtree, held = shutil.rmtree, []

    def remove(folder, *arguments, **options):
        if "step_00000001" in Path(folder).name:
            held.append(Path(folder).name)
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        rmtree(folder, *arguments, **options)

    monkeypatch.setattr(checkpoints_folder.shutil, "rmtree", remove)
    config = tiny(1, "training.steps=3", *EVERY_STEP)
    run(config)
    assert checkpoints(config) == [".deleting_step_00000001", "step_00000003"]
    assert len(held) == 2  # the next save tried again
    assert "step_00000001 cannot be removed and is left (Directory not empty)" in caplog.text
    run(tiny(1, "training.steps=5", *EVERY_STEP))
    monkeypatch.undo()
    run(tiny(1, "training.steps=6", *EVERY_STEP))
    assert checkpoints(config) == ["step_00000006"]


def test_a_busy_mount_in_an_old_checkpoint_does_not_end_a_run(tiny, caplog):
    config = tiny(1, "training.steps=1", *EVERY_STEP)
    run(config)
    with small_disk(config.run_folder / "checkpoints" / "step_00000001" / "busy", kilobytes=100):
        run(tiny(1, "training.steps=3", *EVERY_STEP))
        assert checkpoints(config) == [".deleting_step_00000001", "step_00000003"]
        left = config.run_folder / "checkpoints" / ".deleting_step_00000001"
        left.rename(left.with_name("step_00000001"))  # where it was mounted
    assert os.strerror(errno.EBUSY) in caplog.text


def test_of_a_checkpoint_that_is_a_link_the_link_is_removed(tiny, tmp_path, caplog):
    config = tiny(1, "training.steps=1", *EVERY_STEP)
    run(config)
    link = newest_checkpoint(config.run_folder)
    link.rename(tmp_path / "elsewhere")
    link.symlink_to(tmp_path / "elsewhere")
    run(tiny(1, "training.steps=3", *EVERY_STEP))
    assert checkpoints(config) == ["step_00000003"]
    assert (tmp_path / "elsewhere" / "state.json").is_file() and "which it led to, stays" in caplog.text


def test_multiples_of_keep_every_stay(tiny):
    config = tiny(1, "training.steps=7", "training.checkpoint.every=1", "training.checkpoint.keep_every=3")
    run(config)
    assert checkpoints(config) == [f"step_{step:08d}" for step in (3, 6, 7)]


@pytest.mark.parametrize(("preset", "steps"), [("paper-2b", 50_000), ("base", 20_000), ("small", 4_000)])
def test_a_preset_keeps_the_checkpoints_that_its_curve_over_training_needs(tmp_path, preset, steps):
    config = load_config(preset, [f"runs_folder={tmp_path}"])
    assert config.training.steps == 5 * steps
    folder = config.run_folder / "checkpoints"
    for step in range(steps // 2, config.training.steps + 1, steps // 2):
        (folder / f"step_{step:08d}").mkdir(parents=True)
        checkpoints_folder.prune(config.run_folder, config.training.checkpoint)
    kept = {int(path.name[-8:]) for path in folder.iterdir()}
    assert set(range(steps, config.training.steps + 1, steps)) <= kept and len(kept) == 6


def test_no_save_is_reported_before_it_is_complete(tiny, monkeypatch):
    reported: list[Saved] = []
    config = tiny(1, "training.checkpoint.every=1")

    class Noting(checkpoint_writer.CheckpointWriter):
        def __init__(self, *arguments, **named):
            *others, on_saved = arguments

            def note(saved: Saved) -> None:
                assert newest_checkpoint(config.run_folder).name == f"step_{saved.step:08d}"
                reported.append(saved)
                on_saved(saved)

            super().__init__(*others, note, **named)

    monkeypatch.setattr("cola_megatron.training.loop.CheckpointWriter", Noting)
    run(config)
    assert [saved.step for saved in reported] == [1, 2, 3, 4, 5, 6]


# ---- damage --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[RunConfig, RunConfig]]:
    """`saved(ranks)`: a finished run, and one like it that stopped with checkpoints of steps 2 and 4."""
    folder, done = tmp_path_factory.mktemp("damage"), {}

    def pair(ranks: int) -> tuple[RunConfig, RunConfig]:
        if ranks not in done:
            common = [*TINY, *EVERY_TWO, "stage=1", f"data.path={corpus}", f"runs_folder={folder}"]
            common.append(f"parallel.zero_stage={ranks}")
            straight, stopped = (load_config("tiny", [*common, f"name={name}{ranks}"]) for name in ("whole", "part"))
            run_on(ranks, run, straight)
            part = stopped.training.model_copy(update={"stop_after": 4})
            run_on(ranks, run, stopped.model_copy(update={"training": part}))
            done[ranks] = straight, stopped
        return done[ranks]

    return pair


def copy_of(config: RunConfig, tmp_path: Path) -> RunConfig:
    copied = config.model_copy(update={"runs_folder": tmp_path / "copies"})
    shutil.copytree(config.run_folder, copied.run_folder)
    return copied


def flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


def change_the_step(checkpoint: Path) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, "step": 5}))


TENSOR_FILE = "tensors/rank_00000_000.safetensors"
DAMAGES = {
    "cut short": lambda checkpoint: os.truncate(checkpoint / TENSOR_FILE, 10_000),
    "a flipped bit": lambda checkpoint: flip(checkpoint / TENSOR_FILE, 0.9),
    "a flipped bit in the header": lambda checkpoint: flip(checkpoint / TENSOR_FILE, 0.0),
    "a missing file": lambda checkpoint: (checkpoint / TENSOR_FILE).unlink(),
    "no index": lambda checkpoint: (checkpoint / "tensors" / "index.json").unlink(),
    "another index": lambda checkpoint: flip(checkpoint / "tensors" / "index.json"),
    "no state": lambda checkpoint: (checkpoint / "state.json").unlink(),
    "another state": change_the_step,
    "half a state": lambda checkpoint: os.truncate(checkpoint / "state.json", 200),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(saved, tmp_path, caplog, damage):
    straight, stopped = saved(1)
    config = copy_of(stopped, tmp_path)
    newest = newest_checkpoint(config.run_folder)
    DAMAGES[damage](newest)
    run(config)
    (warning,) = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    for part in (
        str(newest),
        "moved aside as damaged_step_00000004",
        "resuming from step_00000002",
        "2 steps are lost",
    ):
        assert part in warning
    assert "\n" not in warning
    steps = ["step_00000002", "step_00000004", "step_00000006"]
    assert checkpoints(config) == ["damaged_step_00000004", *steps]
    assert curve(config) == curve(straight)
    assert_same_tensors(newest_checkpoint(straight.run_folder), newest_checkpoint(config.run_folder))


def test_all_ranks_go_back_from_what_one_of_them_finds(saved, tmp_path):
    straight, stopped = saved(2)
    config = copy_of(stopped, tmp_path)
    flip(newest_checkpoint(config.run_folder) / "tensors" / "rank_00001_000.safetensors", 0.99)
    run_ranks(run, 2, config)
    assert "damaged_step_00000004" in checkpoints(config)
    assert curve(config) == curve(straight)
    assert_same_tensors(newest_checkpoint(straight.run_folder), newest_checkpoint(config.run_folder))


def test_a_second_damage_of_the_same_step_does_not_replace_the_first(saved, tmp_path):
    config = copy_of(saved(1)[1], tmp_path)
    newest = newest_checkpoint(config.run_folder)
    shutil.copytree(newest, newest.with_name("damaged_step_00000004"))
    flip(newest / TENSOR_FILE)
    run(config)
    assert {"damaged_step_00000004", "damaged_step_00000004_2"} < set(checkpoints(config))


def test_where_all_are_damaged_nothing_is_moved_and_nothing_starts_from_scratch(saved, tmp_path):
    config = copy_of(saved(1)[1], tmp_path)
    for name in checkpoints(config):
        flip(config.run_folder / "checkpoints" / name / TENSOR_FILE)
    before = (config.run_folder / "metrics.jsonl").read_text()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="holds damaged checkpoints only") as refusal:
            run(config)
        assert str(config.run_folder / "checkpoints") in str(refusal.value) and "\n" not in str(refusal.value)
        assert checkpoints(config) == ["step_00000002", "step_00000004"]
    for name in checkpoints(config):
        (config.run_folder / "checkpoints" / name).rename(config.run_folder / "checkpoints" / f"damaged_{name}")
    with pytest.raises(CheckpointError, match="holds damaged checkpoints only"):
        run(config)
    assert (config.run_folder / "metrics.jsonl").read_text() == before


def test_another_config_is_refused_without_going_back(saved, tmp_path):
    config = copy_of(saved(1)[1], tmp_path)
    with pytest.raises(CheckpointError, match="seed was 66, now 67"):
        run(config.model_copy(update={"seed": 67}))
    assert checkpoints(config) == ["step_00000002", "step_00000004"]


def test_readers_of_weights_refuse_a_damaged_checkpoint_and_leave_it_where_it_is(saved, tmp_path):
    config = copy_of(saved(1)[1], tmp_path)
    os.truncate(newest_checkpoint(config.run_folder) / TENSOR_FILE, 10_000)
    with pytest.raises(DamagedCheckpoint, match=r"is missing or damaged.*use another checkpoint") as refusal:
        read_weights(require_checkpoint(config.run_folder))
    assert "\n" not in str(refusal.value)
    assert checkpoints(config) == ["step_00000002", "step_00000004"]
