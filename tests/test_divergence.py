"""Steps that go wrong: what is skipped, rolled back or stopped, and what is kept of them."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cola_megatron.checkpoint.errors import NotFinite
from cola_megatron.checkpoint.find import newest_checkpoint
from cola_megatron.checkpoint.load import read_weights
from cola_megatron.checkpoint.state_file import read_state
from cola_megatron.config import RunConfig
from cola_megatron.config.training import DivergenceConfig
from cola_megatron.data import TokenShards, training_samples
from cola_megatron.families.cola.chain import Cola
from cola_megatron.records.metrics import read_metrics
from cola_megatron.records.progress import read_progress
from cola_megatron.training.bad_steps import RollBack, batch_of, read_roll_backs
from cola_megatron.training.divergence import Divergence
from cola_megatron.training.engine import Engine
from cola_megatron.training.loop import TrainingDiverged, train
from tests.ranks import run_ranks

# ---- the judge ------------------------------------------------------------------------------------------------------


def metrics(loss: float = 1.0, norm: float = 1.0) -> dict[str, float]:
    return {"loss": loss, "gradient_norm": norm}


def judge(**policy) -> Divergence:
    """One that has seen ten steps with losses around 1."""
    watching = Divergence(DivergenceConfig(spike_window=10, **policy))
    for step in range(10):
        assert watching.judge(step + 1, metrics(1 + 0.01 * (step % 2))) is None
        watching.accept(metrics(1 + 0.01 * (step % 2)))
    return watching


def test_what_is_no_number_is_bad_under_every_policy() -> None:
    for action in ("skip", "roll_back", "stop"):
        bad = judge(not_finite=action).judge(11, metrics(math.nan))
        assert (bad.step, bad.action, bad.reason) == (11, action, "loss is nan")
    assert judge().judge(11, metrics(norm=math.inf)).reason == "gradient_norm is inf"


def test_a_spike_is_far_above_a_full_window() -> None:
    watching = judge(spike="skip")
    assert watching.judge(11, metrics(1.02)) is None
    assert watching.judge(11, metrics(1.2)).reason.startswith("loss is 1.2, above 1.0")
    assert watching.judge(11, metrics(norm=1.1)).reason.startswith("gradient_norm is 1.1")
    assert judge(spike="ignore").judge(11, metrics(50.0)) is None
    young = Divergence(DivergenceConfig(spike="skip", spike_window=10))
    young.accept(metrics())
    assert young.judge(2, metrics(50.0)) is None


def test_too_many_skips_stop_the_run_also_after_a_resume() -> None:
    watching = judge(not_finite="skip", max_skips=2)
    for step in (11, 12):
        watching.skip(watching.judge(step, metrics(math.nan)))
    resumed = Divergence(watching.policy, json.loads(json.dumps(watching.state())))
    for each in (watching, resumed):
        assert each.skipped_updates == 2
        bad = each.judge(13, metrics(math.nan))
        assert bad.action == "stop" and "2 of the last 10 updates were skipped already" in bad.reason
        assert each.judge(22, metrics(math.nan)).action == "skip", "those are long ago"


def test_which_batch_a_step_reads() -> None:
    backs = [RollBack(at=7, to=4, left_out=3), RollBack(at=12, to=8, left_out=4)]
    assert [batch_of(step, backs) for step in (0, 3, 4, 7, 8, 20)] == [0, 3, 7, 10, 15, 27]


# ---- runs -----------------------------------------------------------------------------------------------------------


class Poisoned:
    """The loss of these global batches is no number, or far too high: told by the noise that they were drawn with."""

    def __init__(self, config: RunConfig, batches: list[int], factor: float):
        self.factor = factor
        shards = TokenShards(config.data.path, "train", verify="size")
        samples, size = training_samples(shards, config.data.seed), config.training.global_batch_size
        self.rows = {sample.tokens.tobytes() for batch in batches for sample in samples.read(batch * size, size)}

    def __enter__(self) -> None:
        self.forward = forward = Cola.forward

        def poisoned(model: Cola, batch: dict, *arguments, **options) -> dict:
            outputs = forward(model, batch, *arguments, **options)
            if model.training and any(row.numpy().tobytes() in self.rows for row in batch["tokens"]):
                outputs = {name: value * self.factor for name, value in outputs.items()}
            return outputs

        Cola.forward = poisoned

    def __exit__(self, *error: object) -> None:
        Cola.forward = self.forward


def poisoned_train(config: RunConfig, batches: list[int], factor: float) -> None:
    with Poisoned(config, batches, factor):
        train(config, progress=False)


def losses(config: RunConfig) -> dict[int, float]:
    records = read_metrics(config.run_folder / "metrics.jsonl")
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


SKIP = ["training.divergence.not_finite=skip", "training.checkpoint.every=2"]


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ["parallel.zero_stage=0"]),
        (1, ["parallel.zero_stage=1"]),
        (1, ["parallel.zero_stage=2"]),
        (1, ["parallel.zero_stage=3"]),
        (1, ["parallel.zero_stage=2", "parallel.offload_optimizer=true"]),
        (1, ["parallel.zero_stage=1", "training.precision=bf16"]),
        (1, ["parallel.zero_stage=2", "training.precision=bf16"]),
        (1, ["parallel.zero_stage=3", "training.precision=bf16"]),
        (2, ["parallel.zero_stage=1"]),
        (2, ["parallel.zero_stage=2", "training.precision=bf16"]),
        pytest.param(2, ["parallel.zero_stage=1", "parallel.tensor_parallel_size=2"], marks=pytest.mark.slow),
        (2, ["parallel.zero_stage=1", "parallel.pipeline_parallel_size=2"]),
    ],
)
def test_a_skipped_update_changes_nothing(tiny, ranks: int, overrides: list[str]) -> None:
    # Steps 3 (good) and 4 (bad): as after step 3 of a run that ends there.
    straight = tiny(2, *SKIP, "training.steps=3", "name=straight", *overrides)
    if ranks == 1:
        train(straight, progress=False)
    else:
        run_ranks(train, ranks, straight, False)
    _, before = read_weights(newest_checkpoint(straight.run_folder))
    spike = ["training.divergence.spike=skip", "training.divergence.spike_window=2"]
    for name, factor, more in (("nan", math.nan, []), ("spike", 1e4, spike)):
        config = tiny(2, *SKIP, *more, "training.steps=4", f"name={name}", *overrides)
        if ranks == 1:
            poisoned_train(config, [3], factor)
        else:
            run_ranks(poisoned_train, ranks, config, [3], factor)
        newest = newest_checkpoint(config.run_folder)
        assert newest.name == "step_00000004"
        _, after = read_weights(newest)
        assert all(torch.equal(after[tensor], before[tensor]) for tensor in before), name
        assert read_state(newest)["divergence"]["skipped_updates"] == 1
        assert sorted(losses(config)) == [1, 2, 3]


@pytest.mark.parametrize("policy", ["skip", "roll_back"])
def test_a_resumed_run_goes_on_as_if_undisturbed(tiny, policy: str) -> None:
    overrides = [f"training.divergence.not_finite={policy}", "training.checkpoint.every=2", "training.steps=8"]
    straight, resumed = (tiny(1, *overrides, f"name={name}") for name in ("straight", "resumed"))
    poisoned_train(straight, [4], math.nan)
    for last in (5, 7, 8):
        poisoned_train(tiny(1, *overrides, "name=resumed", f"training.stop_after={last}"), [4], math.nan)
    assert losses(resumed) == losses(straight)
    assert len(losses(straight)) == (7 if policy == "skip" else 8)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_roll_back_leaves_out_the_batches_from_the_checkpoint_on(tiny, ranks: int) -> None:
    overrides = ["training.divergence.not_finite=roll_back", "training.checkpoint.every=2", "training.steps=6"]
    config = tiny(1, *overrides)
    if ranks == 1:
        poisoned_train(config, [3], math.nan)
    else:
        run_ranks(poisoned_train, 2, config, [3], math.nan)
    assert read_roll_backs(config.run_folder) == [RollBack(at=4, to=2, left_out=2)]
    # The same by hand: up to step 2, and on with the batches from 4 on.
    other = tiny(1, *overrides, "name=other", "training.stop_after=2")
    train(other, progress=False)
    (other.run_folder / "roll_backs.json").write_text('[{"at": 4, "to": 2, "left_out": 2}]')
    train(tiny(1, *overrides, "name=other"), progress=False)
    expected = losses(other)
    assert losses(config) == (expected if ranks == 1 else pytest.approx(expected, rel=1e-4))
    assert sorted(expected) == [1, 2, 3, 4, 5, 6]


def test_a_branch_leaves_out_what_its_trunk_left_out(tiny) -> None:
    overrides = ["training.divergence.not_finite=roll_back", "training.checkpoint.every=2", "training.steps=6"]
    trunk = tiny(1, *overrides, "name=trunk", "training.checkpoint.keep_last=9")
    poisoned_train(trunk, [3], math.nan)
    for step in (2, 4):
        checkpoint = trunk.run_folder / "checkpoints" / f"step_{step:08d}"
        branch = tiny(1, *overrides, f"name=branch{step}", f"training.start_from={checkpoint}")
        poisoned_train(branch, [3], math.nan)
        assert losses(branch) == {number: loss for number, loss in losses(trunk).items() if number > step}
        assert read_roll_backs(branch.run_folder) == read_roll_backs(trunk.run_folder)


def test_roll_backs_are_bounded_and_begin_anew_without_a_checkpoint(tiny) -> None:
    policy = ["training.divergence.not_finite=roll_back", "training.divergence.max_roll_backs=2"]
    config = tiny(1, *policy)
    with pytest.raises(TrainingDiverged, match="after 2 roll backs"):
        poisoned_train(config, list(range(20)), math.nan)
    assert [back.to for back in read_roll_backs(config.run_folder)] == [0, 0]


def test_the_bad_batch_is_kept(tiny) -> None:
    config = tiny(1, "training.steps=4")
    with pytest.raises(TrainingDiverged, match=r"step 3: .*loss is nan.*bad_steps/step_00000003"):
        poisoned_train(config, [2], math.nan)
    folder = config.run_folder / "bad_steps" / "step_00000003"
    described = json.loads((folder / "step.json").read_text())
    assert (described["action"], described["first_sample"], described["samples"]) == ("stop", 16, 8)
    assert described["metrics"]["loss"] == "nan"
    shards = TokenShards(config.data.path, "train", verify="size")
    expected = np.stack([sample.tokens for sample in training_samples(shards, config.data.seed).read(16, 8)])
    np.testing.assert_array_equal(load_file(folder / "tokens.safetensors")["tokens"].numpy(), expected)


def test_the_plain_policy_asks_nobody(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Callable | None] = []
    step = Engine.step
    monkeypatch.setattr(
        Engine, "step", lambda engine, batches, at, accepts=None: (asked.append(accepts), step(engine, batches, at))[1]
    )
    config = tiny(1, "training.steps=2")
    train(config, progress=False)
    assert asked == [None, None]
    assert not any("skipped_updates" in record for record in read_metrics(Path(config.run_folder) / "metrics.jsonl"))


# ---- models that are of no use --------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_not_saved_and_the_checkpoint_before_stays(tiny, monkeypatch) -> None:
    """As the last update of a run may leave them, when no loss will show it any more."""
    step = Engine.step

    def spoil(engine: Engine, batches, number: int, accepts) -> dict[str, float]:
        found = step(engine, batches, number, accepts)
        if number == 3:
            with torch.no_grad():
                next(engine.model.parameters()).fill_(math.nan)
        return found

    monkeypatch.setattr(Engine, "step", spoil)
    every = ["training.steps=4", "training.checkpoint.every=2", "parallel.zero_stage=0"]
    for asynchronous in ("true", "false"):
        config = tiny(1, *every, f"name={asynchronous}", f"training.checkpoint.asynchronous={asynchronous}")
        # Beside a save goes the measurement, which may find it out first.
        with pytest.raises((NotFinite, TrainingDiverged), match=r"step 4: .* is not (finite|a number)"):
            train(config, progress=False)
        assert newest_checkpoint(config.run_folder).name == "step_00000002"
        assert read_progress(config.run_folder)["state"] == "diverged"
        assert not (config.run_folder / "summary.json").exists()


def test_a_run_whose_measurement_is_not_a_number_is_not_finished(tiny, monkeypatch) -> None:
    monkeypatch.setattr("cola_megatron.training.loop.evaluate", lambda *a, **o: {"reconstruction_nll": math.nan})
    config = tiny(1, "training.steps=2")
    for _ in range(2):  # a second start does not call it finished either
        with pytest.raises(TrainingDiverged, match="step 2: reconstruction_nll of the held-out text is not a number"):
            train(config, progress=False)
        assert not (config.run_folder / "summary.json").exists()
        assert read_progress(config.run_folder)["state"] == "diverged"


def test_a_run_that_fails_says_so_in_its_progress(tiny, monkeypatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Engine, "step", fail)
    config = tiny(1)
    with pytest.raises(RuntimeError, match="out of luck"):
        train(config, progress=False)
    assert read_progress(config.run_folder)["state"] == "failed"
