"""`cola convert verify`: what counts as equal, what it says of a difference, and its exit codes."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cola_megatron.checkpoint.find import newest_checkpoint
from cola_megatron.conversion.export_checkpoint import export_checkpoint
from cola_megatron.conversion.import_weights import import_weights
from cola_megatron.training.loop import train
from launchers.cli import app
from tests.test_interop import GOLDEN, PARTS, change_tensors

NORM = "txt_out_norm.weight"
OURS = "dit.output_norm.weight"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The golden model, to be changed."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "model"))


def verify(*arguments: object) -> tuple[int, str]:
    """Exit code and output, a table."""
    result = CliRunner().invoke(app, ["convert", "verify", *map(str, arguments)])
    return result.exit_code, result.output


def found(*arguments: object) -> tuple[int, dict[str, Any]]:
    """Exit code and output, JSON."""
    result = CliRunner().invoke(app, ["convert", "verify", "--json", *map(str, arguments)])
    return result.exit_code, json.loads(result.stdout)


def test_a_run_its_checkpoint_its_export_and_an_import_of_that_are_equal(tiny, tmp_path: Path) -> None:
    config = tiny(2, "training.steps=1")
    train(config, progress=False)
    exported, imported = tmp_path / "exported", tmp_path / "imported"
    export_checkpoint(config.run_folder, exported, progress=False)
    import_weights(exported, imported, "tiny", [], progress=False)
    for other in (newest_checkpoint(config.run_folder), exported, imported):
        for pair in ((config.run_folder, other), (other, config.run_folder)):
            code, report = found(*pair)
            assert code == 0 and report["equal"] and report["tokenizer"] == "equal", report
            assert {each["name"]: each["absolute"] for each in report["outputs"]} == {
                "encode, mean": 0.0,
                "encode, log variance": 0.0,
                "decode": 0.0,
                "velocity": 0.0,
            }


def test_equal_models_are_said_to_be_equal(copied: Path) -> None:
    code, shown = verify(GOLDEN, copied)
    assert code == 0
    assert "tensors                             141 of 141 equal bit for bit" in shown
    assert "verdict                             equal" in shown


def test_the_worst_tensors_come_first(copied: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NORM] *= 1.01
        tensors["txt_in.proj.bias"] *= 1.02

    change_tensors(copied / "cola_dit", change)
    code, report = found(GOLDEN, copied)
    assert code == 1 and not report["equal"]
    assert [each["name"] for each in report["distances"]] == ["dit.input.bias", OURS]
    assert [each["relative"] for each in report["distances"]] == pytest.approx([0.02 / 1.02, 0.01 / 1.01], rel=1e-4)
    outputs = {each["name"]: each["relative"] for each in report["outputs"]}
    assert outputs["velocity"] > 1e-3 and outputs["decode"] == outputs["encode, mean"] == 0
    code, shown = verify(GOLDEN, copied)
    assert code == 1 and "139 of 141" in shown and f"    {OURS} " in shown and "different" in shown


def test_a_tolerance_accepts_differences_of_values(copied: Path) -> None:
    def rounded(tensors: dict[str, torch.Tensor]) -> None:
        weights = {name: tensor for name, tensor in tensors.items() if not name.endswith(".freqs")}
        tensors.update({name: tensor.bfloat16() for name, tensor in weights.items()})

    for part in PARTS:
        change_tensors(copied / part, rounded)
        config = json.loads((copied / part / "config.json").read_text())
        (copied / part / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    code, report = found(GOLDEN, copied)
    assert code == 1 and "cola_vae/config.json: dtype" in [each["name"] for each in report["remarks"]]
    assert found(GOLDEN, copied, "--tolerance", 0.05)[0] == 0
    assert found(GOLDEN, copied, "--tolerance", 1e-4)[0] == 1


def test_rounded_rotary_frequencies_are_another_config(copied: Path) -> None:
    def rounded(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensors[name].bfloat16() for name in tensors if name.endswith(".freqs")})

    change_tensors(copied / "cola_dit", rounded)
    code, report = found(GOLDEN, copied, "--tolerance", 1e9)
    assert code == 1
    assert report["configs"] == [{"name": "model.dit.rotary_precision", "first": "float32", "second": "bfloat16"}]
    assert {each["name"] for each in report["outputs"] if each["absolute"]} == {"velocity"}


def test_the_smallest_bit_counts(copied: Path) -> None:
    change_tensors(copied / "cola_vae", lambda tensors: tensors["decoder.final_norm.bias"][:1].mul_(1 + 2**-23))
    code, report = found(GOLDEN, copied)
    assert code == 1 and [each["name"] for each in report["distances"]] == ["vae.decoder.norm.bias"]
    assert found(GOLDEN, copied, "--tolerance", 1e-5)[0] == 0
    assert found(GOLDEN, copied, "--tolerance", 0)[0] == 1


def test_a_zero_of_another_sign_and_a_nan_count(copied: Path, tmp_path: Path) -> None:
    change_tensors(copied / "cola_dit", lambda tensors: tensors[NORM].fill_(0.0))
    negative = Path(shutil.copytree(copied, tmp_path / "negative"))
    change_tensors(negative / "cola_dit", lambda tensors: tensors[NORM].fill_(-0.0))
    code, report = found(copied, negative, "--no-forward")
    assert code == 1 and report["distances"] == [{"name": OURS, "absolute": 0.0, "relative": 0.0}]
    change_tensors(negative / "cola_dit", lambda tensors: tensors[NORM][:1].fill_(math.nan))
    code, report = found(copied, negative, "--no-forward", "--tolerance", 1e9)
    assert code == 1 and report["distances"] == [{"name": OURS, "absolute": None, "relative": None}]


@pytest.mark.parametrize(
    ("part", "key", "value", "kind"),
    [
        ("cola_vae", "scaling_factor", 1.5, "configs"),
        ("cola_dit", "norm_eps", 1e-6, "configs"),
        ("cola_dit", "transformers_version", "5.0", "remarks"),
    ],
)
def test_every_key_that_differs_is_named(copied: Path, part: str, key: str, value: object, kind: str) -> None:
    path = copied / part / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {key: value}))
    code, report = found(GOLDEN, copied)
    assert code == 1
    assert report[kind] == [{"name": f"{part}/config.json: {key}", "first": config[key], "second": value}]
    assert found(GOLDEN, copied, "--tolerance", 1e9)[0] == (1 if kind == "configs" else 0)


def test_keys_are_ours_where_a_side_has_no_config_json(tiny, tmp_path: Path) -> None:
    runs = [tiny(2, "training.steps=1", f"name={name}", f"model.dit.norm_eps={eps}") for name, eps in PAIR]
    for config in runs:
        train(config, progress=False)
    code, report = found(*(config.run_folder for config in runs), "--no-forward")
    assert code == 1
    assert report["configs"] == [{"name": "model.dit.norm_eps", "first": 1e-5, "second": 1e-6}]


PAIR = (("one", "1e-5"), ("other", "1e-6"))


def without_prior(folder: Path) -> None:
    shutil.rmtree(folder / "cola_dit")


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def with_another_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_prior, "only in the first"),
        (without_tokenizer, "tokenizer.json                      only in the first"),
        (with_another_tokenizer, "tokenizer.json                      different"),
    ],
)
def test_what_one_of_them_lacks_is_said(copied: Path, change: Callable[[Path], None], said: str) -> None:
    change(copied)
    code, shown = verify(GOLDEN, copied, "--tolerance", 1e9)
    assert code == 1 and " ".join(said.split()) in " ".join(shown.split())


def test_models_of_other_shapes_are_compared_as_far_as_they_go(copied: Path, tmp_path: Path, tiny) -> None:
    config = tiny(1, "training.steps=1")
    train(config, progress=False)
    code, report = found(GOLDEN, config.run_folder)
    assert code == 1 and report["outputs"] == []
    assert {"name": "model.vocab_size", "first": 320, "second": 300} in report["configs"]
    assert "dit.input.bias" in report["only_first"]
    assert {each["name"] for each in report["shapes"]} >= {"vae.encoder.embedding.weight"}
    assert "forward pass not compared" in " ".join(verify(GOLDEN, config.run_folder)[1].split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((GOLDEN, "nowhere"), "nowhere holds no complete checkpoint"),
        ((GOLDEN, GOLDEN / "cola_dit"), "model_type='cola_dit' is not supported"),
        ((GOLDEN,), "Missing argument"),
        ((GOLDEN, GOLDEN, "--tolerance", "-1"), "--tolerance"),
    ],
)
def test_wrong_use_is_neither_equal_nor_different(arguments: tuple, message: str) -> None:
    code, shown = verify(*arguments)
    assert code == 2 and message in shown
