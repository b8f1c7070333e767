"""Runs that older versions left behind are resumed, started from, exported, measured and generated from."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cola_megatron import ColaDLM
from cola_megatron.checkpoint.find import newest_checkpoint
from cola_megatron.checkpoint.load import read_weights
from cola_megatron.checkpoint.reshard import reshard
from cola_megatron.checkpoint.state_file import read_config, read_state, write_state
from cola_megatron.config import ConfigError, load_config, stored_tree
from cola_megatron.config.changes import SCHEMA_KEY, schema_after
from cola_megatron.config.history import CHANGES
from cola_megatron.conversion.export_checkpoint import export_checkpoint
from cola_megatron.errors import UserError
from cola_megatron.evaluation.likelihood import held_out_texts
from cola_megatron.held_out.measure_checkpoint import measure_checkpoint
from cola_megatron.records.metrics import read_metrics
from cola_megatron.training.loop import train
from launchers.slurm.array import write_again, write_array
from launchers.slurm.queue import Queue
from launchers.slurm.render import Shape
from launchers.slurm.site import load_site

OLD_RUNS = sorted((Path(__file__).parent / "data" / "old_runs").glob("schema_*"))
STAGE1, STAGE2 = Path("runs/stage1"), Path("runs/stage2")

# Another CPU or number of threads adds up in another order: in two steps that moves a loss by less than 1e-5 of it, and
# a gradient norm a little more. A key that lost its value moves them by more than 1e-3.
SUMS = 1e-4
# An accuracy is a count over 480 tokens, of which two near a tie may fall to the other side.
TOKENS = 2 / 480


@pytest.fixture(params=OLD_RUNS, ids=lambda folder: folder.name)
def old(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of an old run's folder, as the working directory: paths in its configs are relative."""
    folder = tmp_path / "old"
    shutil.copytree(request.param, folder)
    monkeypatch.chdir(folder)
    return folder


def expected(folder: Path) -> dict:
    return json.loads((folder / "expected.json").read_text())


def test_there_is_a_run_of_the_first_schema():
    assert [folder.name for folder in OLD_RUNS][:1] == ["schema_1"]


def test_it_resumes(old):
    train(load_config(STAGE2 / "config.yaml", ["training.stop_after=null"]), progress=False)
    records = {each["step"]: each for each in read_metrics(STAGE2 / "metrics.jsonl") if each["kind"] == "train"}
    assert sorted(records) == [1, 2, 3, 4, 5, 6]
    for step, values in expected(old)["next_steps"].items():
        for name, value in values.items():
            assert records[int(step)][name] == pytest.approx(value, rel=SUMS), (step, name)
    # From now on it is a run of today.
    state = read_state(newest_checkpoint(STAGE2))
    assert state["config"] == stored_tree(load_config(STAGE2 / "config.yaml"))
    assert state["config"][SCHEMA_KEY] == schema_after(CHANGES)


def test_a_second_stage_starts_from_its_first(old):
    overrides = ["name=again", "training.stop_after=1", "training.evaluation.every=100"]
    config = load_config(STAGE2 / "config.yaml", overrides)
    train(config, progress=False)
    first, again = (
        next(each for each in read_metrics(folder / "metrics.jsonl") if each["step"] == 1 and each["kind"] == "train")
        for folder in (STAGE2, config.run_folder)
    )
    for name in ("loss", "gradient_norm"):
        assert again[name] == pytest.approx(first[name], rel=SUMS), name


def test_it_is_exported(old):
    export_checkpoint(STAGE2, old / "export", progress=False)
    parts = {part: load_file(old / "export" / part / "model.safetensors") for part in ("cola_vae", "cola_dit")}
    tensors = {f"{part}.{name}": tensor for part, held in parts.items() for name, tensor in held.items()}
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    assert digest.hexdigest() == expected(old)["export_sha256"]


def test_it_is_measured(old):
    found = measure_checkpoint(STAGE2, None, samples=1_000_000)
    for name, value in expected(old)["held_out"].items():
        tolerance = {"abs": TOKENS} if "accuracy" in name else {"rel": SUMS}
        assert found[name] == pytest.approx(value, **tolerance), name
    assert len(held_out_texts(STAGE2, None, None).texts) > 0


def test_it_generates(old):
    told = expected(old)["generation"]
    generated = ColaDLM.from_checkpoint(STAGE2).generate(told["prompts"], **told["options"])
    assert [each.token_ids.tolist() for each in generated] == told["token_ids"]


def test_it_is_resharded_and_then_resumes(old):
    newest = newest_checkpoint(STAGE2)
    moved = reshard(newest, old / "moved", ranks=2, progress=False)
    assert read_config(moved) == read_config(newest)
    for name, tensor in read_weights(newest)[1].items():
        assert tensor.equal(read_weights(moved)[1][name]), name
    shutil.rmtree(newest)
    moved.rename(newest)
    train(load_config(STAGE2 / "config.yaml", ["training.stop_after=5"]), progress=False)
    last = next(each for each in read_metrics(STAGE2 / "metrics.jsonl") if each["step"] == 5)
    assert last["loss"] == pytest.approx(expected(old)["next_steps"]["5"]["loss"], rel=SUMS)


def test_an_array_that_was_submitted_with_it_is_submitted_again(old, monkeypatch):
    """A submission holds the config and the site as that version wrote them, without numbers at the first schema."""
    monkeypatch.setattr("launchers.slurm.array.read_queue", Queue)  # a Slurm with nothing in its queue
    given = (old / STAGE2 / "config.yaml").read_text()
    config, site = load_config(STAGE2 / "config.yaml"), load_site("plain", ["gpus_per_node=0"])
    first = write_array("sweep", [config], site, Shape(1, 1), None)
    (first.element_folders[0] / "config.yaml").write_text(given)
    path = first.element_folders[0] / "site.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("schema:")))
    (STAGE2 / "summary.json").unlink()
    again = write_again(first.parent, [], None)
    assert load_config(again.element_folders[0] / "config.yaml") == config
    assert load_site(str(again.element_folders[0] / "site.yaml")) == site


@pytest.mark.parametrize("part", ["config", "format"])
def test_what_a_newer_version_wrote_is_refused_by_name(old, part):
    """And the run does not go back to an older checkpoint, as it would from a damaged one."""
    newest = newest_checkpoint(STAGE2)
    state = read_state(newest)
    config = load_config(STAGE2 / "config.yaml", ["training.stop_after=null"])
    if part == "config":
        write_state(newest, {**state, "config": {**state["config"], SCHEMA_KEY: 999}})
        expected_words = ("schema 999", f"schemas up to {schema_after(CHANGES)}")
    else:
        write_state(newest, state)
        path = newest / "state.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": 999}))
        expected_words = ("format 999", "formats up to 1")
    for use in (
        lambda: train(config, progress=False),
        lambda: export_checkpoint(STAGE2, old / "export", progress=False),
        lambda: measure_checkpoint(STAGE2, None, samples=8),
        lambda: ColaDLM.from_checkpoint(STAGE2),
        lambda: reshard(STAGE2, old / "moved", ranks=2, progress=False),
    ):
        with pytest.raises(UserError) as refusal:
            use()
        for words in (str(newest.name), *expected_words):
            assert words in str(refusal.value)
    assert newest.is_dir()


def test_a_stored_config_of_a_newer_version_is_refused_by_name(old):
    path = STAGE2 / "config.yaml"
    path.write_text(f"schema: 999\n{path.read_text()}")
    with pytest.raises(ConfigError, match=r"stage2/config\.yaml has a config of schema 999"):
        load_config(path)
