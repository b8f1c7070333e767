"""The config tree: presets, overrides, and refusals in one line that names key, value and cure."""

from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import pytest
import yaml

from cola_megatron.config import (
    ConfigError,
    RunConfig,
    Section,
    dump_config,
    load_config,
    load_tree,
    preset_names,
    stored_config,
)
from cola_megatron.config.types import NOT_BOOL
from data_prep.recipe import Recipe
from launchers.slurm.site import Site
from tests.commands import cola


@pytest.mark.parametrize("preset", preset_names())
def test_a_preset_resolves_and_survives_a_round_trip(preset):
    config = load_config(preset)
    assert stored_config(yaml.safe_load(dump_config(config)), "config.yaml") == config


def test_paper_preset_holds_the_published_settings():
    config = load_config("paper-2b")
    training = config.training
    assert (config.data.sequence_length, training.global_batch_size) == (512, 1408)
    assert (training.optimizer.betas, training.optimizer.weight_decay, training.optimizer.max_gradient_norm) == (
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
    ("overrides", "named"),
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
        ("training.schedule.decay_from=20", ["decay_from=20", "warmup_steps=50", "decay_steps=1000"]),
        ("training.checkpoint.at=[0]", ["training.checkpoint.at", "0", "greater than 0"]),
        ("training.checkpoint.at=5", ["training.checkpoint.at=5", "tuple"]),
        ("model.vae.variational=false", ["objective.vae.beta", "variational"]),
        ("name=../elsewhere", ["name", "../elsewhere"]),
        ("name=[1]", ["name=[1]", "valid string", "quote it"]),
        ("novalue", ["novalue", "section.key=value"]),
        ("training..steps=2", ["training..steps=2", "section.key=value"]),
        (".steps=2", [".steps=2", "section.key=value"]),
        ("training.=2", ["training.=2", "section.key=value"]),
        ("training.steps=2024-13-45", ["training.steps", "2024-13-45", "integer"]),
        ("model.vae.block_size=32", ["model.dit.block_size=16", "divisible by model.vae.block_size=32", "stage 2"]),
        (
            "parallel.tensor_parallel_size=4 model.dit.hidden_size=130",
            ["model.dit.hidden_size=130", "divisible by parallel.tensor_parallel_size=4"],
        ),
        (
            "stage=1 data.sequence_length=126 model.dit.block_size=2 "
            "parallel.tensor_parallel_size=4 parallel.sequence_parallel=true",
            ["data.sequence_length=126", "126 latents", "divisible by parallel.tensor_parallel_size=4"],
        ),
        (
            "model.dit.block_size=2 parallel.tensor_parallel_size=4 parallel.sequence_parallel=true",
            ["model.dit.block_size=2", "254", "divisible by parallel.tensor_parallel_size=4"],
        ),
        ("data.seed=-1", ["data.seed=-1", "greater than or equal to 0"]),
        (f"data.seed={2**64}", [f"data.seed={2**64}", "less than 18446744073709551616"]),
        ("training.optimizer.betas=[0.9,1.0]", ["training.optimizer.betas.1=1.0", "less than 1"]),
        ("training.optimizer.betas=[-0.1,0.9]", ["training.optimizer.betas.0=-0.1", "greater than or equal to 0"]),
        ("training.optimizer.betas=[true,0.9]", ["training.optimizer.betas", "number, not true or false"]),
        ("model.vae.latent_dim=1 model.dit.latent_dim=1", ["model.vae.latent_dim=1", "at least 2", "mean_norm=false"]),
        (
            "model.vae.latent_dim=1 model.dit.latent_dim=1 model.vae.mean_norm=false model.vae.variational=false "
            "objective.vae.beta=0 objective.reference_weight=0",
            ["model.vae.latent_dim=1", "variational=true"],
        ),
        ("objective.flow.time.loc=.nan", ["objective.flow.time.loc=nan", "finite number"]),
        ("training.optimizer.learning_rate=.inf", ["training.optimizer.learning_rate=inf", "finite number"]),
        ("objective.vae.beta=1e400", ["objective.vae.beta=inf", "finite number"]),
        ("model.vae.fixed_logsnr=-.inf", ["model.vae.fixed_logsnr=-inf", "finite number"]),
        ("training.optimizer.betas=[.nan,0.9]", ["training.optimizer.betas.0=nan", "number"]),
        ("training.steps=true", ["training.steps=True", "number, not true or false"]),
        ("training.stop_after=true", ["training.stop_after=True", "number, not true or false"]),
        ("objective.vae.beta=true", ["objective.vae.beta=True", "number, not true or false"]),
        ("stage=true", ["stage=True", "number, not true or false"]),
        ("parallel.sequence_parallel=maybe", ["parallel.sequence_parallel='maybe'", "boolean"]),
        (
            "training.stage_one=runs/first training.vae_update.from_scratch=true",
            ["training.stage_one=runs/first", "vae_update.from_scratch=true", "one of them"],
        ),
        ("training.stop_after=1001", ["training.stop_after=1001", "steps=1000"]),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(overrides, named):
    with pytest.raises(ConfigError) as refusal:
        load_config("tiny", overrides.split())
    message = str(refusal.value)
    assert "\n" not in message
    for part in named:
        assert part in message


@pytest.mark.parametrize(
    "overrides",
    [
        "model.vae.block_size=32 model.dit.block_size=64 parallel.tensor_parallel_size=4",
        "model.vae.block_size=32 stage=1",
        "stage=1 model.dit.block_size=2 parallel.tensor_parallel_size=4 parallel.sequence_parallel=true",
        "model.dit.block_size=2 parallel.tensor_parallel_size=4",
        "model.dit.block_size=4 parallel.tensor_parallel_size=4 parallel.sequence_parallel=true",
        f"data.seed={2**64 - 1}",
        "training.optimizer.betas=[0,0.9]",
        "model.vae.latent_dim=1 model.dit.latent_dim=1 model.vae.mean_norm=false",
        "objective.vae.beta=1",
        "training.stop_after=1000",
    ],
)
def test_what_is_just_inside_the_rules_is_accepted(overrides):
    load_config("tiny", overrides.split())


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


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x80\x81\xff", "not a text file"),
        (b"name: \x00", "not valid YAML"),
        (b"[1, 2]", "the top level must be a mapping"),
        (None, "Is a directory"),
    ],
)
def test_what_is_no_config_file_is_refused_in_one_line(tmp_path, content, reason):
    source = tmp_path / "some.yaml"
    if content is None:
        source.mkdir()
    else:
        source.write_bytes(content)
    with pytest.raises(ConfigError) as refusal:
        load_config(source)
    assert str(refusal.value).startswith(f"{source}: {reason}")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["12", "007", "1e3", "2024-01-01", "true", "1_000"])
def test_text_that_looks_like_a_number_stays_as_it_was_typed(name):
    config = load_config("tiny", [f"name={name}", f"runs_folder={name}", f"training.log.wandb_project='{name}'"])
    assert (config.name, str(config.runs_folder), config.training.log.wandb_project) == (name, name, name)


@pytest.mark.parametrize("name", ["12", "007", "1e3", "1.10", "2024-01-01", "1_000", "no"])
def test_a_name_that_looks_like_something_else_is_a_name_in_a_file_too(tmp_path, name):
    file = tmp_path / "some.yaml"
    file.write_text(f"name: {name}\ntraining: {{optimizer: {{learning_rate: 1}}}}")
    assert load_config(file).name == name


def test_the_command_prints_the_tree_and_exits_with_2_on_wrong_use():
    shown = cola("config", "tiny", "model.dit.block_size=8")
    assert shown.returncode == 0
    assert yaml.safe_load(shown.stdout)["model"]["dit"]["block_size"] == 8
    refused = cola("config", "tiny", "model.dit.block_size=7")
    assert refused.returncode == 2
    assert refused.stderr.startswith("cola: model.dit.block_size=7") and refused.stderr.count("\n") == 1


def numbers_without_a_guard(annotation, metadata=()) -> bool:
    if get_origin(annotation) is Annotated:
        return numbers_without_a_guard(annotation.__origin__, annotation.__metadata__)
    if get_origin(annotation) is Literal:
        numbers = any(type(value) is int for value in get_args(annotation))
    elif get_args(annotation):
        return any(numbers_without_a_guard(each) for each in get_args(annotation))
    else:
        numbers = annotation in (int, float)
    return numbers and NOT_BOOL not in metadata


def every_section(kind: type[Section] = Section) -> set[type[Section]]:
    return set(kind.__subclasses__()).union(*map(every_section, kind.__subclasses__()))


@pytest.mark.parametrize("tree", [RunConfig, Recipe, Site])
def test_true_is_no_number_anywhere(tree):
    own = {each for each in every_section() if each.__module__.split(".")[0] == tree.__module__.split(".")[0]}
    assert tree in own
    for section in own:
        for name, field in section.model_fields.items():
            assert not numbers_without_a_guard(field.annotation, field.metadata), f"{section.__name__}.{name}"


# ---- YAML ----------------------------------------------------------------------------------------------------------


def of_file(tmp_path: Path, text: str) -> RunConfig:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load_config(path)


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("training:\n  steps: 5000\ndata: {path: x}\ntraining:\n  micro_batch_size: 4\n", "training", "1 and 4"),
        ("training:\n  optimizer: {eps: 1e-3, eps: 1e-4}\n", "eps", "2 and 2"),
    ],
)
def test_a_repeated_key_is_refused_with_both_of_its_lines(tmp_path, text, key, lines):
    with pytest.raises(ConfigError, match=rf"config\.yaml: {key} stands twice, in lines {lines}: join the two"):
        of_file(tmp_path, text)


def test_a_repeated_key_is_refused_in_recipes_sites_and_overrides_too(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("output: data\noutput: elsewhere\n")
    for kind in (Recipe, Site):
        with pytest.raises(ConfigError, match="output stands twice, in lines 1 and 2"):
            load_tree(kind, path)
    with pytest.raises(ConfigError, match=r"training\.optimizer: eps stands twice"):
        load_config("tiny", ["training.optimizer={eps: 1, eps: 2}"])


@pytest.mark.parametrize(
    ("text", "number"),
    [("042", 42), ("010", 10), ("08", 8), ("1e3", 1000), ("1_000", 1000), ("0", 0), ("1:30", None), ("0x10", None)],
)
def test_a_number_is_the_same_in_a_file_and_in_an_override(tmp_path, text, number):
    ways = (lambda: of_file(tmp_path, f"seed: {text}\n"), lambda: load_config("tiny", [f"seed={text}"]))
    for way in ways:
        if number is None:
            with pytest.raises(ConfigError, match="seed='"):
                way()
        else:
            assert way().seed == number


@pytest.mark.parametrize("name", ["1e3", "007", "no", "on", "2026-11-27", "null", "12"])
def test_a_text_that_looks_like_something_else_is_stored_and_read_as_it_is(tmp_path, name):
    config = load_config("tiny", [f"name='{name}'"])
    assert config.name == name
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config
    assert yaml.safe_load(dump_config(config))["name"] == name


def test_truth_values_of_all_spellings_are_read_where_one_is_asked_for(tmp_path):
    for text, value in (("true", True), ("yes", True), ("off", False)):
        config = of_file(tmp_path, f"training: {{activation_checkpointing: {text}}}\n")
        assert config.training.activation_checkpointing is value
