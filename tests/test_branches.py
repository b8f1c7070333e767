"""A trunk at a constant rate, and runs that branch off to decay: schedule, kept checkpoints, equality with one run."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cola_megatron.checkpoint.folder import folder_of
from cola_megatron.checkpoint.load import read_weights
from cola_megatron.config import ConfigError, RunConfig, load_config
from cola_megatron.records.metrics import read_metrics
from cola_megatron.training.loop import train
from cola_megatron.training.optimizer import learning_rate
from tests.support import TINY
from tests.test_autoregressive_training import SMALL

LENGTH = 8
PEAK = [f"training.schedule.{key}" for key in ("decay_from=6", "decay_steps=6")]
DECAY = ["training.schedule.decay_from=4", f"training.schedule.decay_steps={LENGTH}", "training.schedule.decay=1-sqrt"]


def rates(*schedule: str) -> Callable[[int], float]:
    keys = [f"training.schedule.{key}" for key in ("warmup_steps=10", "final_learning_rate=1e-4", *schedule)]
    training = load_config("tiny", ["training.optimizer.learning_rate=1e-3", *keys]).training
    return lambda step: learning_rate(training, step)


def test_the_rate_stays_at_its_peak_from_the_warm_up_to_where_the_decay_begins():
    for decay, half_way in (("cosine", 5.5e-4), ("linear", 5.5e-4), ("1-sqrt", 1e-4 + 9e-4 * (1 - 0.5**0.5))):
        rate = rates("decay_from=30", "decay_steps=50", f"decay={decay}")
        assert [rate(step) for step in (9, 10, 29)] == [1e-3] * 3
        assert rate(8) < 1e-3 and rate(30) == pytest.approx(1e-3) and rate(31) < 1e-3
        assert rate(40) == pytest.approx(half_way) and rate(50) == rate(99) == 1e-4


def test_a_decay_from_the_end_of_the_warm_up_is_that_without_the_key():
    plain, said = rates("decay_steps=50"), rates("decay_steps=50", "decay_from=10")
    assert [plain(step) for step in range(60)] == [said(step) for step in range(60)]


def test_a_trunk_has_no_decay_before_its_last_step():
    rate = rates("decay_from=50", "decay_steps=50")
    assert {rate(step) for step in range(10, 50)} == {1e-3} and rate(50) == 1e-4


@pytest.mark.parametrize("decay_from", [9, 51])
def test_a_decay_begins_within_the_schedule(decay_from):
    with pytest.raises(
        ConfigError, match=rf"decay_from={decay_from} must lie within warmup_steps=10 and decay_steps=50"
    ):
        rates("decay_steps=50", f"decay_from={decay_from}")


def test_steps_that_are_named_get_a_checkpoint_which_stays(tiny):
    keys = ["training.checkpoint.every=3", "training.checkpoint.keep_last=1", "training.checkpoint.at=[2,4]"]
    config = tiny(1, "training.steps=7", *keys)
    train(config, progress=False)
    assert checkpoints(config) == [2, 4, 7]
    # What a resumed run is to keep may change; a step that is over gets no checkpoint.
    longer = tiny(1, "training.steps=9", *keys[:2], "training.checkpoint.at=[4,5,8]")
    train(longer, progress=False)
    assert checkpoints(longer) == [4, 8, 9]


@pytest.fixture(params=["autoregressive", "cola"])
def build(request, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    """`build(*overrides)`: a run of that family below the working directory; Cola's is stage 2, with a reference."""
    monkeypatch.chdir(tmp_path)
    paths = [f"data.path={corpus}", "runs_folder=runs"]
    if request.param == "autoregressive":
        return lambda *overrides: load_config("tiny-autoregressive", [*SMALL, *paths, *overrides])
    first = load_config("tiny", [*TINY, *paths, "stage=1", "name=first", "training.steps=2"])
    train(first, progress=False)
    stage_two = [*TINY, *paths, "stage=2", "training.stage_one=runs/first", "training.vae_update.from_scratch=false"]
    return lambda *overrides: load_config("tiny", [*stage_two, *overrides])


def test_a_branch_equals_the_run_that_decays_from_there_bit_for_bit(build):
    trunk = build("name=trunk", "training.steps=6", "training.checkpoint.at=[4]", *PEAK)
    train(trunk, progress=False)
    assert checkpoints(trunk) == [4, 6]

    start = os.path.relpath(folder_of(trunk.run_folder, 4))
    steps = f"training.steps={LENGTH}"
    branch, single = (
        build("name=branch", steps, f"training.start_from={start}", *DECAY),
        build("name=single", steps, *DECAY),
    )
    of_branch, of_single = train(branch, progress=False), train(single, progress=False)
    assert curve(branch) == curve(single)[4:] and curve(trunk)[:4] == curve(single)[:4]
    assert curve(trunk)[4:] != curve(single)[4:6]
    assert of_branch.metrics == of_single.metrics and of_branch.tokens == of_single.tokens
    (_, found), (_, expected) = (read_weights(folder_of(run.run_folder, LENGTH)) for run in (branch, single))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_branch_that_is_stopped_goes_on_from_its_own_checkpoint(build):
    trunk = build("name=trunk", "training.steps=6", "training.checkpoint.at=[4]", *PEAK)
    train(trunk, progress=False)
    start = f"training.start_from={folder_of(trunk.run_folder, 4)}"
    keys = [f"training.steps={LENGTH}", start, *DECAY]
    straight, halves = build("name=straight", *keys), build("name=halves", *keys)
    train(straight, progress=False)
    assert train(build("name=halves", "training.stop_after=6", *keys), progress=False).step == 6
    assert train(halves, progress=False).finished
    assert curve(halves) == curve(straight)


def checkpoints(config: RunConfig) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (config.run_folder / "checkpoints").glob("step_*"))


def curve(config: RunConfig) -> list[tuple[float, float, float]]:
    records = [record for record in read_metrics(config.run_folder / "metrics.jsonl") if record["kind"] == "train"]
    return [(record["loss"], record["gradient_norm"], record["learning_rate"]) for record in records]
