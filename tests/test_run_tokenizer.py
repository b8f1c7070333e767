"""A run holds its tokenizer: what lies at data.path later, or in another directory, is not taken for it."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from cola_megatron import ColaDLM
from cola_megatron.checkpoint.errors import CheckpointError, DamagedCheckpoint
from cola_megatron.checkpoint.find import newest_checkpoint
from cola_megatron.checkpoint.state_file import read_state, write_state
from cola_megatron.config import RunConfig, load_config
from cola_megatron.data import read_tokenizer, tokenizer_fingerprint
from cola_megatron.data.manifest import sha256_of
from cola_megatron.errors import UserError
from cola_megatron.evaluation.likelihood import held_out_texts
from cola_megatron.held_out.measure_checkpoint import measure_checkpoint
from cola_megatron.interop.stored_model import CheckpointModel
from cola_megatron.training.loop import train
from tests.commands import cola
from tests.support import TINY

FORMER = ["training.steps=1", "data.path=data", "runs_folder=runs"]


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with data/ and runs/tiny of one step, whose config names both by relative paths."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(corpus, folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(load_config("tiny", [*TINY, *FORMER]), progress=False)
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def config(*overrides: str) -> RunConfig:
    return load_config("tiny", [*TINY, *FORMER, *overrides])


def another_tokenizer(path: Path) -> None:
    """Of the same size: two tokens change places."""
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["files"]["tokenizer.json"] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    (path.parent / "manifest.json").write_text(json.dumps(manifest))


def as_an_older_version_wrote_it(run: Path) -> Path:
    """Without a tokenizer in run and checkpoint."""
    (run / "tokenizer.json").unlink()
    checkpoint = newest_checkpoint(run)
    (checkpoint / "tokenizer.json").unlink()
    state = {name: value for name, value in read_state(checkpoint).items() if name != "tokenizer"}
    write_state(checkpoint, state)
    return checkpoint


def test_run_and_checkpoint_hold_the_tokenizer_and_its_fingerprint(here):
    checkpoint, given = newest_checkpoint(Path("runs/tiny")), Path("data/tokenizer.json")
    for folder in (Path("runs/tiny"), checkpoint):
        assert (folder / "tokenizer.json").read_bytes() == given.read_bytes()
    assert read_state(checkpoint)["tokenizer"] == tokenizer_fingerprint(given)
    assert "tokenizer.json" in read_state(checkpoint)["files"]


def test_a_run_generates_and_is_exported_from_another_directory_and_without_its_data(here, tmp_path, monkeypatch):
    shutil.rmtree("data")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tokenizer.json").write_text("{}")  # another project's
    cola("convert", "export", here / "runs" / "tiny", tmp_path / "exported")
    assert (tmp_path / "exported" / "tokenizer.json").is_file()
    model = ColaDLM.from_checkpoint(here / "runs" / "tiny")
    assert model.generate(["the prior"], steps=1, max_new_tokens=8)[0].text is not None
    alone = shutil.copytree(newest_checkpoint(here / "runs" / "tiny"), tmp_path / "alone")
    assert ColaDLM.from_checkpoint(alone).tokenizer is not None


def test_of_an_older_run_only_the_tokenizer_of_its_own_data_is_used(here, tmp_path, monkeypatch, caplog):
    checkpoint = as_an_older_version_wrote_it(here / "runs" / "tiny")
    monkeypatch.chdir(tmp_path)
    assert CheckpointModel(checkpoint).tokenizer.resolve() == (here / "data" / "tokenizer.json").resolve()
    another_tokenizer(here / "data" / "tokenizer.json")
    manifest = json.loads((here / "data" / "manifest.json").read_text())
    shard = next(name for name in manifest["files"] if name.startswith("train/") and name.endswith(".mds"))
    manifest["files"][shard]["sha256"] = "0" * 64  # as other text becomes other shards
    (here / "data" / "manifest.json").write_text(json.dumps(manifest))
    assert CheckpointModel(checkpoint).tokenizer is None
    assert "of other data than it was trained on, and is not used" in caplog.text


def test_an_export_without_a_tokenizer_is_refused(here, tmp_path):
    as_an_older_version_wrote_it(here / "runs" / "tiny")
    shutil.rmtree("data")
    refused = cola("convert", "export", "runs/tiny", tmp_path / "exported")
    assert refused.returncode == 1 and "no tokenizer.json is known" in refused.stderr
    assert not (tmp_path / "exported").exists()


def test_another_tokenizer_in_a_checkpoint_is_refused_by_name(here):
    another_tokenizer(Path("data/tokenizer.json"))
    shutil.copy("data/tokenizer.json", newest_checkpoint(Path("runs/tiny")))
    with pytest.raises(DamagedCheckpoint, match=r"tokenizer\.json is not the tokenizer that the checkpoint was"):
        CheckpointModel(Path("runs/tiny"))


def test_data_of_another_tokenizer_are_refused(here):
    shutil.copytree("data", "other")
    another_tokenizer(Path("other/tokenizer.json"))
    run, other = Path("runs/tiny"), Path("other")
    for use in (lambda: measure_checkpoint(run, other, 8), lambda: held_out_texts(run, other, 8)):
        with pytest.raises(UserError, match="other was prepared with another tokenizer than that of the model"):
            use()
    with pytest.raises(CheckpointError, match="was trained with another tokenizer than the one in"):
        train(config("data.path=other", "training.steps=2"), progress=False)


def test_a_start_from_weights_of_another_tokenizer_is_said(here, caplog):
    shutil.copytree("data", "other")
    another_tokenizer(Path("other/tokenizer.json"))
    train(
        config(
            "name=again", "data.path=other", "training.stage_one=runs/tiny", "training.vae_update.from_scratch=false"
        ),
        progress=False,
    )
    assert "training.stage_one=runs/tiny knows other tokens" in caplog.text


@pytest.mark.parametrize("what", ["truncation", "padding"])
def test_a_tokenizer_file_that_cuts_or_pads_texts_does_neither_here(here, what):
    path = Path("data/tokenizer.json")
    tokenizer, text = Tokenizer.from_file(str(path)), "the prior writes latent blocks of noise and meaning flows back"
    expected = tokenizer.encode(text).ids
    before = tokenizer_fingerprint(path)
    if what == "truncation":
        tokenizer.enable_truncation(4)
    else:
        tokenizer.enable_padding(length=64)
    tokenizer.save(str(path))
    assert Tokenizer.from_file(str(path)).encode(text).ids != expected
    assert read_tokenizer(path).encode(text).ids == expected
    assert tokenizer_fingerprint(path) == before


def test_of_a_run_with_document_attention_it_is_said_that_inference_has_none(here, caplog):
    CheckpointModel(Path("runs/tiny"))
    assert "document_attention" not in caplog.text
    train(config("name=apart", "data.document_attention=true"), progress=False)
    CheckpointModel(Path("runs/apart"))
    assert "give each document by itself" in caplog.text
