"""The config tree: presets, overrides, and refusals in one line that names key, value and cure."""

import subprocess
import sys

import pytest
import yaml

from cola_megatron.config import ConfigError, dump_config, load_config, preset_names, resolve_config


@pytest.mark.parametrize("preset", preset_names())
def test_a_preset_resolves_and_survives_a_round_trip(preset):
    config = load_config(preset)
    assert resolve_config(yaml.safe_load(dump_config(config))) == config


def test_paper_preset_holds_the_published_settings():
    config = load_config("paper-2b")
    training = config.training
    assert (config.data.sequence_length, training.global_batch_size) == (512, 1408)
    assert (training.optimizer.betas, training.optimizer.weight_decay, training.optimizer.clip) == (
        (0.9, 0.95),
        0.01,
        1.0,
    )
    schedule = training.schedule
    assert (schedule.initial_learning_rate, training.optimizer.learning_rate) == (1e-6, 1.5e-4)
    assert (schedule.warmup_steps, schedule.decay_steps, schedule.final_learning_rate) == (5000, 1_000_000, 1e-5)
    assert (config.seed, config.data.seed, training.precision) == (66, 6198, "bf16")
    assert (config.model.vae.block_size, config.model.dit.block_size) == (1, 16)


def test_overrides_reach_their_key():
    config = load_config("tiny", ["model.dit.block_size=32", "training.optimizer.learning_rate=1e-3", "name=other"])
    assert config.model.dit.block_size == 32
    assert config.training.optimizer.learning_rate == 1e-3
    assert config.name == "other"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.dit.blok_size=3", ["model.dit.blok_size", "3", "block_size"]),
        ("training.steps=abc", ["training.steps", "abc", "integer"]),
        ("training.steps=0", ["training.steps", "0", "greater than 0"]),
        ("model.dit.latent_dim=8", ["model.dit.latent_dim=8", "vae.latent_dim=16"]),
        ("parallel.tensor_parallel_size=3", ["num_attention_heads=4", "parallel.tensor_parallel_size=3"]),
        ("model.dit.block_size=7", ["model.dit.block_size=7", "128"]),
        ("model.vae.hidden_size=130", ["model.vae.hidden_size=130", "num_attention_heads", "4"]),
        ("model.dit.rotary_dim=64", ["model.dit.rotary_dim=64", "head_dim=32"]),
        ("training.precision=fp16", ["training.precision", "fp16", "bf16"]),
        ("training.micro_batch_size=5", ["global_batch_size=32", "micro_batch_size=5"]),
        ("objective.vae.mask_ratio=0", ["objective.vae.mask_ratio=0", "mask_weight=0"]),
        ("training.schedule.warmup_steps=5000", ["training.schedule.warmup_steps=5000", "decay_steps=1000"]),
        ("parallel.sequence_parallel=true", ["parallel.sequence_parallel", "tensor_parallel_size"]),
        ("model.vae.variational=false", ["objective.vae.beta", "variational"]),
        ("name=../elsewhere", ["name", "../elsewhere"]),
        ("novalue", ["novalue", "key=value"]),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(override, named):
    with pytest.raises(ConfigError) as refusal:
        load_config("tiny", [override])
    message = str(refusal.value)
    assert "\n" not in message
    for part in named:
        assert part in message


def test_bf16_needs_master_weights():
    with pytest.raises(ConfigError, match=r"parallel.zero_stage=0.*zero_stage=1"):
        load_config("tiny", ["training.precision=bf16", "parallel.zero_stage=0"])


def test_an_unknown_source_lists_the_presets():
    with pytest.raises(ConfigError, match=r"nonsense: neither a config file nor one of the presets tiny, small"):
        load_config("nonsense")


def test_a_broken_file_is_named(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: [")
    with pytest.raises(ConfigError, match=r"broken.yaml: not valid YAML"):
        load_config(broken)


def test_the_command_prints_the_tree_and_exits_with_2_on_wrong_use():
    def cola(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "launchers.cli", "config", *arguments], capture_output=True, text=True, timeout=60
        )

    shown = cola("tiny", "model.dit.block_size=8")
    assert shown.returncode == 0
    assert yaml.safe_load(shown.stdout)["model"]["dit"]["block_size"] == 8
    refused = cola("tiny", "model.dit.block_size=7")
    assert refused.returncode == 2
    assert refused.stderr.startswith("cola: model.dit.block_size=7") and refused.stderr.count("\n") == 1
