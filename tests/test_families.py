"""What holds of every family of models: facets, presets, batches, parts; and what one refuses of others."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cola_megatron import ColaDLM, load_model
from cola_megatron.config import ConfigError, RunConfig, load_config
from cola_megatron.config.families import CONFIGS
from cola_megatron.config.load import preset_names
from cola_megatron.conversion.export_checkpoint import export_checkpoint
from cola_megatron.conversion.import_weights import import_weights
from cola_megatron.conversion.open_model import open_model
from cola_megatron.data import training_samples
from cola_megatron.data.run_shards import open_shards
from cola_megatron.errors import UserError
from cola_megatron.families import FAMILIES, family_of
from cola_megatron.inference.settings import CommonSettings
from cola_megatron.parallel import initialize_parallel
from cola_megatron.reporting.compared_runs import read_runs
from cola_megatron.reporting.comparison import metric_names
from cola_megatron.reporting.tables import model_rows
from cola_megatron.training.batches import MicroBatches
from cola_megatron.training.build_model import initialize_run
from cola_megatron.training.divergence import TrainingDiverged, require_finite
from cola_megatron.training.loop import train
from tests.support import TINY
from tests.test_autoregressive_training import SMALL
from tools import bench_step

SIZES = ("tiny", "small", "base", "paper-2b")
PRESETS = {"cola": "", "autoregressive": "-autoregressive", "masked_diffusion": "-masked-diffusion", "plaid": "-plaid"}
ONLY_COLA = {"stage", "training.stage_one", "training.vae_update"}
TOKENS = [name for name in PRESETS if name != "cola"]
"""The families whose networks read and write tokens, in one stage."""
ROOT = Path(__file__).parents[1]
OF_A_FAMILY = re.compile(
    rf"import .*families\.({'|'.join(PRESETS)})|from cola_megatron\.families\.({'|'.join(PRESETS)})"
)


def small(family: str, corpus: Path, folder: Path, *overrides: str) -> RunConfig:
    paths = [f"data.path={corpus}", f"runs_folder={folder}", f"name={family}"]
    sizes = TINY if family == "cola" else SMALL
    return load_config(f"tiny{PRESETS[family]}", [*sizes, *paths, *overrides])


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value and f"{prefix}{name}" not in ONLY_COLA:
            found |= leaves(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of two steps for each family of tokens."""
    folder, sizes = tmp_path_factory.mktemp("families"), ["training.steps=2", "training.evaluation.samples=4"]
    for name in TOKENS:
        train(small(name, corpus, folder, *sizes), progress=False)
    return {name: folder / name for name in TOKENS}


def test_what_stands_above_the_families_imports_none():
    """`ColaDLM` in the Python interface and the tools about Cola's pipeline are the ones that name one."""
    for folder in (
        "checkpoint",
        "conversion",
        "evaluation",
        "held_out",
        "planning",
        "reporting",
        "scaling",
        "training",
    ):
        for file in (ROOT / "cola_megatron" / folder).glob("*.py"):
            assert not OF_A_FAMILY.search(file.read_text()), file
    for file in (ROOT / "launchers").rglob("*.py"):
        assert not OF_A_FAMILY.search(file.read_text()), file


@pytest.mark.parametrize("name", PRESETS)
def test_every_facet_of_a_family_is_there(name):
    family, config = FAMILIES[name], load_config(f"tiny{PRESETS[name]}")
    assert (family.name, config.model.family, family_of(config)) == (name, name, family)
    assert type(config) is CONFIGS[name] and list(CONFIGS) == list(FAMILIES) == list(PRESETS)
    assert isinstance(family.settings(), CommonSettings) and dataclasses.is_dataclass(family.likelihood_settings)
    assert family.describe(config) and family.page.figures and family.page.pictures
    labels = {part.label for part in family.parts(config)}
    assert all(any(label.startswith(words.name) for label in labels) for words in family.page.networks)
    trained = sum(part.parameters for part in family.parts(config) if "reference" not in part.label)
    whole, *networks = [int(row.value.replace(",", "")) for row in model_rows(config)][: 1 + len(family.page.networks)]
    assert whole == sum(networks) == trained and len(networks) == len(family.page.networks)
    shown = [words.name for words in family.page.figures]
    assert ("nats_per_token" in shown) == (name != "cola") and family.generates(config)
    assert family.backbone_parameters(config) > 0 and sum(family.flops_by_purpose(config, 1).values()) > 0


def test_presets_of_one_size_differ_from_those_of_cola_in_the_model_alone():
    """They see the same data in the same order, with the same optimiser, for the same steps."""
    assert sorted(preset_names()) == sorted(f"{size}{end}" for size in SIZES for end in PRESETS.values())
    for size in SIZES:
        cola = leaves(load_config(size).model_dump(mode="json"))
        for name in TOKENS:
            own = leaves(load_config(f"{size}{PRESETS[name]}").model_dump(mode="json"))
            missing = object()
            differing = {key for key in own.keys() | cola.keys() if own.get(key, missing) != cola.get(key, missing)}
            of_the_family = {key for key in differing if key == "name" or key.startswith(("model.", "objective"))}
            assert differing - of_the_family == ONLY_COLA, (size, name)
            assert own["model.vocab_size"] == cola["model.vocab_size"]


@pytest.mark.parametrize("preset", preset_names())
def test_the_page_counts_every_parameter_that_is_trained(preset):
    config = load_config(preset)
    trained = sum(part.parameters for part in family_of(config).parts(config) if part.network != "reference")
    whole, *networks = model_rows(config)
    assert whole.value == f"{trained:,}"
    own = [row for row in networks if "reference" not in row.what]
    assert sum(int(row.value.replace(",", "")) for row in own) == trained


def test_every_family_reads_the_same_tokens_in_the_same_order(corpus, tmp_path):
    seen = {}
    for name in PRESETS:
        config = small(name, corpus, tmp_path, "training.steps=3")
        (shards,) = open_shards(config, config.data.path, ["train"], initialize_parallel())
        batches = MicroBatches(config, training_samples(shards, config.data.seed), 0, 1)
        seen[name] = torch.stack([batches[index].tensors["tokens"] for index in range(len(batches))])
    assert len(seen["cola"]) == 6 and not torch.equal(seen["cola"][0], seen["cola"][1])
    assert all(torch.equal(tokens, seen["cola"]) for tokens in seen.values())


@pytest.mark.parametrize(
    ("name", "overrides"),
    [*((name, []) for name in PRESETS), ("cola", ["stage=1"]), ("masked_diffusion", ["model.block_size=8"])],
)
def test_parts_are_the_steps_that_hold_parameters(corpus, tmp_path, name, overrides):
    config = small(name, corpus, tmp_path, *overrides)
    family = FAMILIES[name]
    model = family.build(config, initialize_parallel())
    steps = [step for step in model.steps(**family.mode_at(config, 0)) if step.part]
    counted, seen = [], set()
    for step in steps:
        own = {id(p): p.numel() for module in step.modules for p in module.parameters()}
        counted.append((step.part, sum(size for key, size in own.items() if key not in seen)))
        seen |= own.keys()
    assert counted == [(part.label, part.parameters) for part in family.parts(config, family.mode_at(config, 0))]


@pytest.mark.parametrize("name", TOKENS)
def test_the_bench_of_a_step_times_the_parts_of_any_family(corpus, tmp_path, name):
    config = small(name, corpus, tmp_path)
    groups = initialize_run(config)
    answer = bench_step.measure(bench_step.with_micro_batches(config, 1, 1), groups, steps=1, trace=None)
    timed = {row.part: row.floor for row in answer.rows}
    labels = {part.label for part in family_of(config).parts(config)}
    assert labels <= timed.keys() and timed["transformer.block"].products > 0


@pytest.mark.parametrize(
    ("preset", "override", "message"),
    [
        ("tiny", "model.family=nosuch", "model.family='nosuch': there is none of that name; known here: cola, auto"),
        ("tiny-plaid", "model.family=masked-diffusion", "there is none of that name; did you mean masked_diffusion?"),
        (
            "tiny-autoregressive",
            "model.dit.block_size=16",
            "model.dit is a key of model.family=cola, and this config has model.family=autoregressive",
        ),
        (
            "tiny",
            "model.family=plaid",
            "model.vae is a key of model.family=cola, and this config has",
        ),
        (
            "tiny-autoregressive",
            "model.block_size=8",
            "model.block_size is a key of model.family=masked_diff",
        ),
        ("tiny-plaid", "training.stage_one=runs/x", "training.stage_one is a key of model.family=cola, and"),
        ("tiny-plaid", "model.transfomer.num_layers=2", "unknown key; did you mean transformer?"),
        ("tiny-masked-diffusion", "model.block_size=24", "model.block_size=24 must divide data.sequence_length=128"),
        (
            "tiny-masked-diffusion",
            "model.mask_token_id=2048",
            "must be a token of the vocabulary, below vocab_size",
        ),
    ],
)
def test_a_config_of_another_family_is_refused_in_one_line(preset, override, message):
    with pytest.raises(ConfigError) as refused:
        load_config(preset, [override])
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_run_folder_in_the_place_of_a_config_names_the_file(runs):
    with pytest.raises(ConfigError, match=r"is a folder: give .*config\.yaml in it"):
        load_config(runs["plaid"])


def test_a_checkpoint_of_another_family_is_no_start_of_a_run(runs, corpus, tmp_path):
    mine, other = runs["autoregressive"], runs["plaid"]

    def refusal(config: RunConfig) -> str:
        with pytest.raises(UserError) as refused:
            train(config, progress=False)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    resumed = refusal(small("plaid", corpus, mine.parent, "name=autoregressive"))
    assert "is of model.family=autoregressive, and this config has model.family=plaid; give another name=" in resumed
    forked = refusal(small("autoregressive", corpus, tmp_path, f"training.start_from={other}"))
    assert "start_from" in forked and "is of model.family=plaid, and this config has model.family=auto" in forked
    of_stage_one = refusal(
        small("cola", corpus, tmp_path, f"training.stage_one={mine}", "training.vae_update.from_scratch=false")
    )
    assert "is no Cola DLM: its model.family is autoregressive" in of_stage_one


def test_what_a_family_has_not_is_refused_with_the_cure(runs, tmp_path):
    with pytest.raises(UserError, match=r"is no Cola DLM: its model\.family is plaid; use load_model"):
        ColaDLM.from_checkpoint(runs["plaid"])
    with pytest.raises(UserError, match="Plaid has no layout of another program"):
        export_checkpoint(runs["plaid"], tmp_path / "export", progress=False)
    export_checkpoint(runs["autoregressive"], tmp_path / "llama", progress=False)
    with pytest.raises(ConfigError, match=r"model\.family=plaid; give one of autoregressive"):
        import_weights(tmp_path / "llama", tmp_path / "import", "tiny-plaid", [], progress=False)
    import_weights(tmp_path / "llama", tmp_path / "import", None, [], progress=False)  # with its own paper-2b
    assert load_config(tmp_path / "import" / "config.yaml").training.global_batch_size == 1408
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", TOKENS)
def test_processes_that_cannot_share_a_matrix_are_refused(runs, name):
    with pytest.raises(ConfigError, match=r"num_key_value_heads=2 must be divisible by tensor_parallel_size=3"):
        load_model(runs[name], tensor_parallel_size=3)


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "gpt2"}', '{"model_type": 3}'])
def test_a_folder_of_an_unknown_layout_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError) as refused:
        open_model(tmp_path)
    assert "config.json" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", TOKENS)
def test_models_of_tokens_share_one_interface(runs, name):
    model, options = load_model(runs[name]), {"max_new_tokens": 3, "temperature": 1.0}
    options |= {"steps": 4} if name == "plaid" else {}
    first, second = model.generate([[5, 6, 7], []], **options)
    assert len(first.token_ids) == len(second.token_ids) == 3
    pieces = list(model.stream([[5, 6, 7]], **options))
    assert [each for piece in pieces for each in piece.token_ids] == first.token_ids.tolist()
    if name == "plaid":
        with pytest.raises(UserError, match="PlaidLM has no logits of token ids"):
            model.logits([5, 6, 7])
    else:
        assert model.logits([5, 6, 7]).shape == (3, 300)
    (likelihood,) = model.log_likelihood([[5, 6, 7]], [[9]])
    assert likelihood.tokens == 3 and likelihood.elbo < 0 and json.dumps(likelihood.as_json())


def test_a_comparison_of_families_begins_with_what_they_share(runs):
    names = metric_names(read_runs(list(runs.values())))
    assert names[:2] == ["nats_per_token", "perplexity"]
    assert not any("standard_error" in name or "_bin_" in name for name in names)


def test_a_term_that_two_families_call_alike_has_a_picture_of_each(runs, tmp_path, caplog):
    """Plaid reads its least noisy state, Cola its latents: both call that reconstruction."""
    pytest.importorskip("matplotlib")
    from cola_megatron.reporting.compare_page import write_comparison

    cola_run, begun = tmp_path / "runs" / "cola", tmp_path / "runs" / "begun"
    corpus = read_runs(list(runs.values()))[0].config.data.path
    train(small("cola", Path(corpus), tmp_path / "runs", "stage=1", "training.steps=2"), progress=False)
    begun.mkdir()
    (begun / ".lock").touch()
    compared = read_runs([*runs.values(), cola_run, begun])
    assert len(compared) == 4 and "begun: this run has no records" in caplog.text
    page = write_comparison(tmp_path, compared).read_text()
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"compare_reconstruction_plaid.png", "compare_reconstruction_cola.png"} <= drawn
    assert "compare_reconstruction.png" not in drawn and "compare_nats_per_token.png" in drawn
    assert "Reconstruction, training, Plaid" in page and "Reconstruction, training, Cola DLM" in page
    assert "the first token of a sequence does not count" in page
    write_comparison(tmp_path, read_runs([cola_run, runs["autoregressive"]]))
    assert (tmp_path / "figures" / "compare_reconstruction_cola.png").is_file()
    assert not (tmp_path / "figures" / "compare_reconstruction_plaid.png").exists()


def test_a_likelihood_that_is_no_number_ends_a_run():
    with pytest.raises(TrainingDiverged, match="nats_per_token of the held-out text is not a number"):
        require_finite(7, {"nats_per_token": float("nan"), "perplexity": float("nan")})
