"""Training runs: what they write, resuming bit for bit, stage 2 from stage 1, frozen and interval VAE."""

import json
import math
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from cola_megatron.checkpoint.errors import CheckpointError
from cola_megatron.checkpoint.find import newest_checkpoint
from cola_megatron.checkpoint.load import read_weights
from cola_megatron.config import ConfigError, RunConfig, load_config
from cola_megatron.errors import UserError
from cola_megatron.parallel.deepspeed_output import quiet_deepspeed
from cola_megatron.records.metrics import read_metrics
from cola_megatron.records.run_folder import lock_run_folder
from cola_megatron.training.loop import TrainingDiverged, train
from cola_megatron.training.optimizer import learning_rate
from tests.commands import cola
from tests.ranks import run_ranks
from tests.support import TINY


def curve(config, *names: str) -> list[tuple[float, ...]]:
    """The named values of every training record, in order of steps."""
    records = [record for record in read_metrics(config.run_folder / "metrics.jsonl") if record["kind"] == "train"]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [tuple(record[name] for name in names or ("loss", "gradient_norm")) for record in records]


def run(config) -> None:
    train(config, progress=False)


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    """`alone(stage, *overrides)`: a run to its end in this process, once for each."""
    folder, done = tmp_path_factory.mktemp("alone"), {}

    def trained(stage: int, *overrides: str) -> RunConfig:
        if (stage, overrides) not in done:
            common = [*TINY, f"stage={stage}", f"data.path={corpus}", f"runs_folder={folder}", f"name=run{len(done)}"]
            done[stage, overrides] = load_config("tiny", [*common, *overrides])
            run(done[stage, overrides])
        return done[stage, overrides]

    return trained


def weights(config) -> dict[str, torch.Tensor]:
    return read_weights(newest_checkpoint(config.run_folder))[1]


def assert_same_weights(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_a_run_writes_config_manifest_metrics_and_summary(tiny):
    config = tiny(2, "training.evaluation.every=3")
    summary = train(config, progress=False)
    folder = config.run_folder
    assert summary.finished and summary.step == 6 and summary.tokens == 6 * 8 * 32
    assert (folder / "config.yaml").is_file()
    assert json.loads((folder / "manifest.json").read_text())["versions"]["torch"] == version("torch")
    assert json.loads((folder / "summary.json").read_text())["tokens"] == summary.tokens
    records = read_metrics(folder / "metrics.jsonl")
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    assert [record["step"] for record in evaluations] == [3, 6]
    measured = evaluations[-1]
    for name in (
        "reconstruction_accuracy",
        "reconstruction_accuracy_t250",
        "reconstruction_accuracy_t500",
        "vae_logsnr",
        "flow_matching_loss",
        "constant_predictor_loss",
        "flow_matching_loss_bin_9",
    ):
        assert name in measured
    assert summary.model_flops > 0


def test_training_learns(tiny):
    config = tiny(1, "training.steps=40", "training.schedule.decay_steps=100")
    run(config)
    losses = [loss for (loss,) in curve(config, "reconstruction")]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("stage", [1, 2])
def test_stop_and_resume_is_bit_identical(tiny, stage):
    straight = tiny(stage, "name=straight")
    run(straight)
    halves = ["name=halves", "training.steps=6"]
    first = train(tiny(stage, *halves, "training.stop_after=3"), progress=False)
    assert not first.finished and first.step == 3
    resumed = tiny(stage, *halves)
    assert train(resumed, progress=False).finished
    assert curve(resumed) == curve(straight)
    assert_same_weights(weights(resumed), weights(straight))


def test_a_longer_run_resumes_a_shorter_one_bit_identically(tiny):
    straight = tiny(2, "name=straight", "training.steps=4")
    run(straight)
    run(tiny(2, "name=extended", "training.steps=2"))
    extended = tiny(2, "name=extended", "training.steps=4")
    run(extended)
    assert curve(extended) == curve(straight)
    assert_same_weights(weights(extended), weights(straight))


@pytest.mark.parametrize("mode", ["joint", "interval"])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_resume_in_bf16_is_bit_identical(tiny, zero_stage, mode):
    overrides = [
        "training.precision=bf16",
        f"parallel.zero_stage={zero_stage}",
        f"training.vae_update.mode={mode}",
        "training.vae_update.joint_steps=2",
        "training.vae_update.frozen_steps=2",
    ]
    straight, halves = tiny(2, "name=straight", *overrides), tiny(2, "name=halves", *overrides)
    run(straight)
    run(tiny(2, "name=halves", "training.stop_after=3", *overrides))
    run(halves)
    assert curve(halves) == curve(straight)
    assert_same_weights(weights(halves), weights(straight))


def test_a_shortened_run_is_finished_and_measured(tiny):
    run(tiny(2, "training.stop_after=3"))
    summary = train(tiny(2, "training.steps=3"), progress=False)
    assert summary.finished and summary.step == 3 and "flow_matching_loss" in summary.metrics


def test_a_run_that_diverges_stops_without_saving(tiny):
    config = tiny(
        1, "training.optimizer.learning_rate=1e30", "training.schedule.warmup_steps=0", "training.checkpoint.every=1"
    )
    with pytest.raises(TrainingDiverged, match=r"step \d+: loss is nan.*learning_rate") as stopped:
        run(config)
    assert "\n" not in str(stopped.value)
    for record in read_metrics(config.run_folder / "metrics.jsonl"):
        assert all(math.isfinite(value) for value in record.values() if isinstance(value, float))


def test_folders_that_users_put_beside_checkpoints_are_left_alone(tiny):
    config = tiny(1, "training.steps=1")
    run(config)
    kept = newest_checkpoint(config.run_folder)
    shutil.copytree(kept, kept.with_name("step_00000009.bak"))
    assert newest_checkpoint(config.run_folder) == kept
    run(tiny(1, "training.steps=4", "training.checkpoint.every=1", "training.checkpoint.keep_last=1"))
    assert kept.with_name("step_00000009.bak").is_dir()


def test_what_is_measured_does_not_depend_on_the_replicas(tiny):
    """23 sequences on 2 replicas, in batches of 4: the last batch of one replica is smaller than the other's."""
    overrides = ["training.steps=1", "training.evaluation.samples=23"]
    alone, together = tiny(2, "name=alone", *overrides), tiny(2, "name=together", "parallel.zero_stage=3", *overrides)
    measured = train(alone, progress=False).metrics
    run_ranks(run, 2, together)
    found = json.loads((together.run_folder / "summary.json").read_text())["metrics"]
    assert found.keys() == measured.keys()
    for name, value in measured.items():
        assert found[name] == pytest.approx(value, rel=1e-3), name


def test_the_config_on_file_is_the_one_of_the_last_start(tiny):
    run(tiny(1, "training.steps=1"))
    config = tiny(1, "training.steps=2")
    run(config)
    assert load_config(config.run_folder / "config.yaml") == config
    manifest = json.loads((config.run_folder / "manifest.json").read_text())
    assert len(manifest["resumed"]) == 1
    with pytest.raises(CheckpointError):
        run(tiny(1, "training.steps=3", "seed=1"))
    assert load_config(config.run_folder / "config.yaml") == config


def test_a_finished_run_is_left_alone(tiny):
    config = tiny(1, "training.steps=2")
    run(config)
    before = (config.run_folder / "metrics.jsonl").read_text()
    assert train(config, progress=False).step == 2
    assert (config.run_folder / "metrics.jsonl").read_text() == before


def test_steps_after_the_checkpoint_are_logged_once(tiny):
    """A run killed after its last save has logged steps that are done again."""
    config = tiny(1, "training.steps=4", "training.checkpoint.every=2")
    run(tiny(1, "training.steps=4", "training.stop_after=2"))
    with (config.run_folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "train", "step": 3, "loss": 1e9, "gradient_norm": 0.0}) + "\n")
        file.write('{"kind": "train", "step"')
    run(config)
    assert len(curve(config)) == 4 and max(loss for loss, _ in curve(config)) < 1e6


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.dit.num_layers=1", "model.dit.num_layers was 2, now 1"),
        ("training.optimizer.learning_rate=1e-3", "training.optimizer.learning_rate was 0.002, now 0.001"),
        ("seed=67", "seed was 66, now 67"),
    ],
)
def test_a_checkpoint_of_another_config_is_refused_naming_the_keys(tiny, override, key):
    run(tiny(2, "training.steps=1"))
    with pytest.raises(CheckpointError) as refusal:
        run(tiny(2, "training.steps=2", override))
    assert key in str(refusal.value) and "\n" not in str(refusal.value)


def test_another_stage_one_at_a_resume_is_refused_because_it_would_not_be_used(tiny, alone):
    first = alone(1, "training.steps=1", "seed=5")
    joint = ["training.vae_update.from_scratch=false", f"training.stage_one={first.run_folder}"]
    run(tiny(2, "training.steps=1", *joint))
    with pytest.raises(CheckpointError, match=r"training\.stage_one was .*, now 'elsewhere'; give the old values"):
        run(tiny(2, "training.steps=2", *joint, "training.stage_one=elsewhere"))
    shutil.rmtree(first.run_folder)  # no resume needs it
    run(tiny(2, "training.steps=2", *joint))


def test_resume_never_refuses_a_used_folder(tiny):
    run(tiny(1, "training.steps=1"))
    with pytest.raises(CheckpointError, match=r"training.resume=never"):
        run(tiny(1, "training.steps=2", "training.resume=never"))


def test_a_damaged_checkpoint_is_named(tiny):
    config = tiny(1, "training.steps=1")
    run(config)
    damaged = next((newest_checkpoint(config.run_folder) / "tensors").glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=f"{damaged.name} is missing or cut short"):
        run(tiny(1, "training.steps=2"))


def test_stage_two_starts_from_the_stage_one_vae_and_keeps_its_encoder_as_reference(tiny):
    first = tiny(1, "name=first", "training.steps=3")
    run(first)
    second = tiny(
        2,
        "name=second",
        "training.steps=1",
        "training.vae_update.from_scratch=false",
        f"training.stage_one={first.run_folder}",
    )
    run(second)
    # Before its first update the encoder is the reference, so the divergence between them is exactly 0.
    assert curve(second, "reference") == [(0.0,)]


def test_stage_two_says_what_is_wrong_with_its_start(tiny):
    joint = "training.vae_update.from_scratch=false"
    with pytest.raises(ConfigError, match=r"training.stage_one is not set"):
        run(tiny(2, "name=a", joint))
    first = tiny(1, "name=first", "training.steps=1")
    run(first)
    with pytest.raises(ConfigError, match=r"model.vae.block_size=2 \(there 1\)"):
        run(tiny(2, "name=b", joint, f"training.stage_one={first.run_folder}", "model.vae.block_size=2"))


def test_stage_two_refuses_an_unfinished_stage_one_unless_its_checkpoint_is_named(tiny):
    first = tiny(1, "name=first", "training.stop_after=2")
    run(first)
    joint = ["training.vae_update.from_scratch=false", "training.steps=1"]
    with pytest.raises(ConfigError, match=r"stopped at step 2 of 6.*step_00000002"):
        run(tiny(2, "name=second", f"training.stage_one={first.run_folder}", *joint))
    run(tiny(2, "name=second", f"training.stage_one={newest_checkpoint(first.run_folder)}", *joint))


def test_two_jobs_do_not_share_a_run_folder(tiny):
    config = tiny(1)
    with lock_run_folder(config.run_folder), pytest.raises(UserError, match="another job is training here"):
        run(config)
    run(config)


def test_a_run_that_is_refused_leaves_no_folder(tiny, tmp_path):
    refused = tiny(2, "name=refused", f"training.start_from={tmp_path / 'nothing'}")
    with pytest.raises(UserError):
        run(refused)
    assert not refused.run_folder.exists()
    with lock_run_folder(refused.run_folder):
        (refused.run_folder / "config.yaml").write_text("")
    assert {path.name for path in refused.run_folder.iterdir()} == {".lock", "config.yaml"}


def test_a_lock_that_was_taken_away_meanwhile_is_no_claim(tmp_path, monkeypatch):
    """Of two jobs that wait for a refused one, each would have a lock of its own."""
    import fcntl

    flock, taken = fcntl.flock, []

    def away(file, how):
        if not taken:
            taken.append((tmp_path / "run" / ".lock").unlink())
        return flock(file, how)

    monkeypatch.setattr(fcntl, "flock", away)
    with (
        lock_run_folder(tmp_path / "run"),
        pytest.raises(UserError, match="another job"),
        lock_run_folder(tmp_path / "run"),
    ):
        pass


def test_frozen_and_interval_vae_change_only_when_they_may(tiny):
    first = tiny(1, "name=first", "training.steps=1")
    run(first)
    source = [f"training.stage_one={first.run_folder}", "training.vae_update.from_scratch=false"]
    frozen = tiny(2, "name=frozen", "training.vae_update.mode=frozen", *source)
    run(frozen)
    started = weights(first)
    for name, value in weights(frozen).items():
        if name.startswith("vae."):
            assert torch.equal(value, started[name]), name
    interval = [
        "training.vae_update.mode=interval",
        "training.vae_update.joint_steps=2",
        "training.vae_update.frozen_steps=2",
    ]
    after = {}
    for stop in (2, 4, 5):
        config = tiny(2, "name=interval", *interval, *source, f"training.stop_after={stop}")
        run(config)
        after[stop] = weights(config)
    vae, dit = "vae.encoder.embedding.weight", "dit.input.weight"
    assert torch.equal(after[2][vae], after[4][vae]) and not torch.equal(after[2][dit], after[4][dit])
    assert not torch.equal(after[4][vae], after[5][vae])


def test_the_vae_can_learn_more_slowly(tiny):
    # AdamW's first step is about the learning rate in every coordinate, whatever the gradient.
    after = {}
    for ratio in (1.0, 0.01):
        config = tiny(2, f"name=ratio{ratio}", "training.steps=1", f"training.vae_update.learning_rate_ratio={ratio}")
        run(config)
        after[ratio] = weights(config)
    vae, dit = "vae.decoder.unpatch.weight", "dit.output.weight"
    assert (after[1.0][vae] - after[0.01][vae]).abs().max() > 0.5 * learning_rate(config.training, 0)
    assert torch.equal(after[1.0][dit], after[0.01][dit])


@pytest.mark.parametrize(("decay", "quarter_way"), [("cosine", 8.68e-4), ("linear", 7.75e-4)])
def test_the_learning_rate_falls_from_its_peak_to_its_end(decay, quarter_way):
    schedule = "training.schedule"
    ends = (f"{schedule}.warmup_steps=10", f"{schedule}.decay_steps=50", f"{schedule}.final_learning_rate=1e-4")
    training = load_config(
        "tiny", [f"{schedule}.decay={decay}", "training.optimizer.learning_rate=1e-3", *ends]
    ).training
    rates = [learning_rate(training, step) for step in (9, 10, 20, 30, 50, 99)]
    assert rates == pytest.approx([1e-3, 1e-3, quarter_way, 5.5e-4, 1e-4, 1e-4], rel=1e-3)


@pytest.mark.parametrize("stage", [1, 2])
def test_micro_batches_and_loader_workers_change_nothing(tiny, stage):
    whole = tiny(stage, "name=whole", "training.micro_batch_size=8")
    run(whole)
    for name, override in (("quarters", "training.micro_batch_size=2"), ("workers", "training.loader_workers=2")):
        other = tiny(stage, f"name={name}", "training.micro_batch_size=8", override)
        run(other)
        for expected, found in zip(curve(whole), curve(other), strict=True):
            # Accumulation sums in another order; a loader must not change a bit.
            assert found == (expected if name == "workers" else pytest.approx(expected, rel=1e-4))


def test_bf16_keeps_float32_master_weights(tiny):
    config = tiny(2, "training.precision=bf16", "training.steps=3")
    run(config)
    exact = tiny(2, "name=exact", "training.steps=3")
    run(exact)
    for (found, _), (expected, _) in zip(curve(config), curve(exact), strict=True):
        assert found == pytest.approx(expected, rel=0.02)  # bfloat16 has 8 bits of mantissa: 0.4% per operation
    value = weights(config)["dit.input.weight"]
    assert value.dtype == torch.float32 and not torch.equal(value, value.bfloat16().float())


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_two_processes_equal_one(tiny, alone, stage, zero_stage):
    one, together = alone(stage, "parallel.zero_stage=0"), tiny(stage, f"parallel.zero_stage={zero_stage}")
    run_ranks(run, 2, together)
    # float32 sums in another order: 1e-5 at the first step, and AdamW carries it on.
    first, *others = zip(curve(one), curve(together), strict=True)
    assert first[1] == pytest.approx(first[0], rel=1e-5)
    for expected, found in others:
        assert found == pytest.approx(expected, rel=1e-3)
    found = weights(together)
    for name, value in weights(one).items():
        assert (found[name] - value).abs().max() < 0.05 * one.training.optimizer.learning_rate * 6, name


def test_a_batch_that_the_replicas_cannot_share_is_refused(tiny):
    with pytest.raises(RuntimeError, match=r"micro_batch_size=8 times the 2 data-parallel replicas"):
        run_ranks(run, 2, tiny(1, "training.micro_batch_size=8"))


@pytest.mark.parametrize("mode", ["interval", "frozen"])
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_frozen_steps_under_zero(tiny, alone, mode, zero_stage):
    overrides = [
        f"training.stage_one={alone(1, 'training.steps=1').run_folder}",
        "training.vae_update.from_scratch=false",
        f"training.vae_update.mode={mode}",
        "training.vae_update.joint_steps=2",
        "training.vae_update.frozen_steps=2",
    ]
    together = tiny(2, f"parallel.zero_stage={zero_stage}", *overrides)
    run_ranks(run, 2, together)
    for expected, found in zip(curve(alone(2, *overrides)), curve(together), strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("sequence_parallel", ["false", "true"])
@pytest.mark.parametrize("stage", [1, 2])
def test_tensor_parallel_equals_one_process(tiny, alone, stage, sequence_parallel):
    steps = "training.steps=4"  # past the warm-up
    together = tiny(stage, steps, "parallel.tensor_parallel_size=2", f"parallel.sequence_parallel={sequence_parallel}")
    run_ranks(run, 2, together)
    first, *others = zip(curve(alone(stage, steps)), curve(together), strict=True)
    assert first[1] == pytest.approx(first[0], rel=1e-5)
    for expected, found in others:
        assert found == pytest.approx(expected, rel=1e-3)


def test_standard_output_has_the_answer_alone(tiny, tmp_path):
    data = tiny(2).data.path
    # In bfloat16 DeepSpeed prints the memory in use while it starts.
    overrides = [*TINY, "stage=2", "training.steps=1", "training.precision=bf16", "parallel.zero_stage=1"]
    answer = cola("train", "tiny", *overrides, f"data.path={data}", f"runs_folder={tmp_path / 'runs'}", "--json")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["step"] == 1


def test_what_deepspeed_prints_is_in_the_log_and_its_warnings_are_on_standard_error(capfd, caplog):
    with caplog.at_level("DEBUG", logger="cola_megatron.parallel.deepspeed_output"), quiet_deepspeed() as deepspeed:
        print("MA 5.81 GB")
        deepspeed.utils.logger.info("a remark")
    assert "DeepSpeed: MA 5.81 GB" in caplog.text and "a remark" not in caplog.text
    deepspeed.utils.logger.warning("a warning")
    assert capfd.readouterr().out == "" and "a warning" in caplog.text


def test_what_deepspeed_printed_is_in_the_log_where_it_fails(caplog):
    logged = caplog.at_level("DEBUG", logger="cola_megatron.parallel.deepspeed_output")
    with logged, pytest.raises(ValueError, match="no engine"), quiet_deepspeed():
        print("the last words")
        raise ValueError("no engine")
    assert "the last words" in caplog.text


# ---- a fork ---------------------------------------------------------------------------------------------------------


def test_a_fork_goes_on_as_the_run_would_have_and_under_other_settings_from_there(tiny):
    straight = tiny(1, "name=straight", "training.steps=4", "training.checkpoint.every=2")
    run(straight)
    from_step_2 = f"training.start_from={straight.run_folder / 'checkpoints' / 'step_00000002'}"
    same, other = (
        tiny(1, f"name={name}", "training.steps=4", from_step_2, *changes)
        for name, changes in (("same", []), ("other", ["training.optimizer.learning_rate=1e-2", "data.seed=7"]))
    )
    for config in (same, other):
        assert train(config, progress=False).finished
        assert [step for step, _ in losses(config)] == [3, 4]
    assert losses(same) == losses(straight)[2:]
    assert_same_weights(weights(same), weights(straight))
    assert losses(other) != losses(same)
    started = json.loads((other.run_folder / "start.json").read_text())
    assert started["step"] == 2 and set(started["differences"]) == {"training.optimizer.learning_rate", "data.seed"}
    more = tiny(1, "name=same", "training.steps=6", from_step_2)
    assert train(more, progress=False).step == 6  # resumes from its own checkpoint


def test_a_fork_of_another_model_or_without_a_step_left_is_refused(tiny, alone):
    first = alone(1, "training.steps=1")
    start = f"training.start_from={first.run_folder}"
    for changes, words in (
        (
            ["model.vae.latent_dim=8", "model.dit.latent_dim=8"],
            r"model\.vae\.latent_dim \(4 there, 8 here",
        ),
        (["training.steps=1"], r"is at step 1, and training\.steps=1: give more steps"),
    ):
        config = tiny(1, start, *changes)
        with pytest.raises(ConfigError, match=words):
            run(config)
        assert not (config.run_folder / "start.json").exists()


def losses(config) -> list[tuple[int, float]]:
    records = read_metrics(config.run_folder / "metrics.jsonl")
    return [(record["step"], record["loss"]) for record in records if record["kind"] == "train"]
