"""Stage 2 goes on from published weights, VAE and prior, under any layout."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from cola_megatron.config import ConfigError, RunConfig, load_config
from cola_megatron.conversion.export_checkpoint import export_checkpoint
from cola_megatron.conversion.import_weights import import_weights
from cola_megatron.data import training_samples
from cola_megatron.data.run_shards import open_shards
from cola_megatron.families.cola.chain import Cola
from cola_megatron.families.cola.published import read_published, write_published
from cola_megatron.families.cola.warm_start import load_starting_weights
from cola_megatron.interop.weight_source import HeldWeights
from cola_megatron.parallel import initialize_parallel, initialize_parameters, load_full_state_dict
from cola_megatron.training.batches import MicroBatches
from cola_megatron.training.loop import train
from tests.ranks import run_ranks
from tests.support import TINY
from tests.test_checkpoint_layouts import ALONE, DATA_ZERO_3, STAGES, STAGES_TENSOR, TENSOR, run_layout
from tests.test_interop import PARTS, random_weights
from tests.test_training import curve

Start = Callable[..., RunConfig]
LAYOUTS = {"alone": ALONE, "tp2": TENSOR, "pp2": STAGES, "tp2_pp2": STAGES_TENSOR, "zero3": DATA_ZERO_3}


@pytest.fixture(scope="module")
def start(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """`start(name, source, *overrides)`: one step of a stage 2 that begins with `published` or `imported`."""
    folder = tmp_path_factory.mktemp("start")
    config = load_config("tiny", TINY).model
    published, imported = folder / "published", folder / "imported"
    write_published(published, config, HeldWeights(random_weights(config)), corpus / "tokenizer.json", torch.bfloat16)
    import_weights(published, imported, "tiny", TINY, progress=False)
    common = [override for override in TINY if not override.startswith(("training.steps", "training.vae_update"))]
    common += ["training.steps=1", "training.precision=fp32", f"data.path={corpus}", f"runs_folder={folder / 'runs'}"]

    def build(name: str, source: str, *overrides: str) -> RunConfig:
        return load_config("tiny", [*common, f"name={name}", f"training.stage_one={folder / source}", *overrides])

    return build


@pytest.fixture(scope="module")
def expected(start: Start) -> float:
    """The loss of the first step, computed from the published weights without a checkpoint or an engine."""
    config, groups = start("expected", "published"), initialize_parallel()
    _, weights = read_published(config.training.stage_one)
    encoder = "vae.encoder."
    reference = {f"reference.{name.removeprefix(encoder)}": weights[name] for name in weights if encoder in name}
    model = Cola(config, groups)
    load_full_state_dict(model, weights | reference, groups)
    (shards,) = open_shards(config, config.data.path, ["train"], groups)
    batches = MicroBatches(config, training_samples(shards, config.data.seed), 0, 1)
    with torch.no_grad():
        losses = [model(batches[index].tensors)["loss"].item() for index in range(batches.per_step)]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("source", ["imported", "published"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_loss_is_that_of_the_published_weights(
    start: Start, expected: float, layout: str, source: str
) -> None:
    config = start(f"{source}_{layout}", source, *LAYOUTS[layout].overrides)
    run_layout(train, LAYOUTS[layout], config, False)
    ((loss,),) = curve(config, "loss")
    assert loss == pytest.approx(expected, rel=1e-5)


def test_a_start_without_the_prior_would_show(start: Start, expected: float) -> None:
    config = start("fresh_prior", "published/cola_vae")
    train(config, progress=False)
    ((loss,),) = curve(config, "loss")
    assert abs(loss - expected) > 0.01 * expected


def test_the_vae_folder_alone_leaves_the_prior_at_its_start(start: Start) -> None:
    config, groups = start("vae_alone", "published/cola_vae"), initialize_parallel()
    model = Cola(config, groups)
    initialize_parameters(model, config.seed, groups)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    load_starting_weights(model, config, groups)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("dit."), name


def test_the_config_beside_an_import_trains_it(start: Start, expected: float) -> None:
    run = start("run", "imported")
    path = run.training.stage_one / "config.yaml"
    assert yaml.safe_load(path.read_text())["model"] == run.model.model_dump(mode="json")
    overrides = [
        "name=from_its_config",
        f"runs_folder={run.runs_folder}",
        f"data.path={run.data.path}",
        f"training.stage_one={run.training.stage_one}",
        "training.vae_update.from_scratch=false",
        "training.steps=1",
    ]
    config = load_config(path, overrides)
    train(config, progress=False)
    assert curve(config, "loss") == [pytest.approx((expected,), rel=1e-5)]


def test_what_was_trained_is_exported_in_float32(start: Start, tmp_path: Path) -> None:
    config = start("trained", "imported")
    train(config, progress=False)
    export_checkpoint(config.training.stage_one, tmp_path / "untrained", progress=False)
    export_checkpoint(config.run_folder, tmp_path / "trained", progress=False)
    for folder, dtype in (("untrained", "bfloat16"), ("trained", "float32")):
        for part in PARTS:
            assert json.loads((tmp_path / folder / part / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("source", ["imported", "published"])
def test_another_architecture_is_named(start: Start, source: str) -> None:
    with pytest.raises(ConfigError, match=r"has another VAE: model\.vae\.block_size=2 \(there 1\)"):
        train(start("other_vae", source, "model.vae.block_size=2"), progress=False)
    with pytest.raises(ConfigError, match=r"another prior: model\.dit\.num_layers=3 \(there 2\).*the cola_vae folder"):
        train(start("other_prior", source, "model.dit.num_layers=3"), progress=False)


def refusal(config: RunConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        train(config, progress=False)
    return str(caught.value)


def test_every_rank_refuses_another_architecture(start: Start) -> None:
    config = start("refused", "imported", "model.dit.num_layers=3", *TENSOR.overrides)
    first, second = run_ranks(refusal, 2, config)
    assert first == second
