"""Weights of the published layout in one file or in shards: what is written, what is read, what is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cola_megatron.families.cola.published import PublishedModel, read_published, write_published
from cola_megatron.interop.errors import PublishedError
from cola_megatron.interop.weight_source import HeldWeights
from tests.test_interop import GOLDEN, PARTS, change_tensors

SHARD = 100_000
INDEX = "model.safetensors.index.json"
FREQUENCIES = "blocks.1.msa.rope.rope.freqs"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The golden model in several files."""
    config, weights = read_published(GOLDEN)
    folder = tmp_path / "sharded"
    write_published(folder, config, HeldWeights(weights), GOLDEN / "tokenizer.json", max_shard_bytes=SHARD)
    return folder


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Of one network, as the library reads them."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        assert not tensors.keys() & found.keys()
        found |= tensors
    return found


def assert_same_weights(first: Path, second: Path) -> None:
    """Names, types and bits of all published tensors, whatever the shards."""
    for part in PARTS:
        ours, theirs = all_tensors(first / part), all_tensors(second / part)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


def assert_same_files(first: Path, second: Path) -> None:
    """The weights, and config.json."""
    assert_same_weights(first, second)
    for part in PARTS:
        configs = [json.loads((folder / part / "config.json").read_text()) for folder in (first, second)]
        assert configs[0] == configs[1]


@pytest.mark.parametrize("part", PARTS)
def test_shards_are_those_of_hugging_face(sharded: Path, part: str) -> None:
    shards = sorted((sharded / part).glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]
    assert len(shards) > 3
    original = load_file(GOLDEN / part / "model.safetensors")
    index = json.loads((sharded / part / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in original.values())}
    assert index["weight_map"].keys() == original.keys()
    for path in shards:
        tensors = load_file(path)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= SHARD or len(tensors) == 1
        assert all(index["weight_map"][name] == path.name for name in tensors)
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        assert path.stat().st_mode == (sharded / "tokenizer.json").stat().st_mode


def test_shards_are_read_like_one_file(sharded: Path, tmp_path: Path) -> None:
    config, weights = read_published(GOLDEN)
    config_again, weights_again = read_published(sharded)
    assert config_again == config and weights_again.keys() == weights.keys()
    assert all(torch.equal(weights_again[name], weight) for name, weight in weights.items())


def test_a_tensor_larger_than_a_shard_is_one(tmp_path: Path) -> None:
    config, weights = read_published(GOLDEN)
    write_published(tmp_path, config, HeldWeights(weights), None, max_shard_bytes=1)
    assert all(len(load_file(path)) == 1 for path in (tmp_path / "cola_dit").glob("*.safetensors"))
    assert_same_weights(tmp_path, GOLDEN)


@pytest.mark.parametrize("again", [SHARD // 2, 10**9])
def test_new_weights_replace_the_old_in_whatever_files(sharded: Path, again: int) -> None:
    config, weights = read_published(sharded)
    (sharded / "cola_dit" / ".writing_model.safetensors").write_bytes(b"what a kill left")
    doubled = HeldWeights({name: 2 * weight for name, weight in weights.items()})
    write_published(sharded, config, doubled, GOLDEN / "tokenizer.json", max_shard_bytes=again)
    for name, weight in read_published(sharded)[1].items():
        assert torch.equal(weight, 2 * weights[name]), name
    assert (sharded / "cola_dit" / INDEX).exists() == (again < SHARD)
    assert not list(sharded.rglob(".*"))


class Failing(HeldWeights):
    """A source that ends in the middle, like a damaged checkpoint."""

    def read(self, name: str) -> torch.Tensor:
        if name == "dit.output.weight":
            raise OSError("the disk is gone")
        return super().read(name)


def test_weights_that_cannot_be_written_whole_leave_the_old_ones(sharded: Path) -> None:
    config, weights = read_published(sharded)
    before = sorted(path.name for path in (sharded / "cola_dit").iterdir())
    with pytest.raises(OSError, match="the disk is gone"):
        write_published(sharded, config, Failing(weights), GOLDEN / "tokenizer.json", max_shard_bytes=10**9)
    assert sorted(path.name for path in (sharded / "cola_dit").iterdir()) == before
    assert all(torch.equal(weight, weights[name]) for name, weight in read_published(sharded)[1].items())


def rewritten(index: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(shards_of(folder)[0])
    tensors.pop(min(tensors))
    save_file(tensors, shards_of(folder)[0])


def repeat_a_tensor(folder: Path) -> None:
    first, second = shards_of(folder)[:2]
    tensors = load_file(first)
    name = min(tensors)
    save_file(load_file(second) | {name: tensors[name]}, second)


def cut_short(folder: Path) -> None:
    path = shards_of(folder)[1]
    path.write_bytes(path.read_bytes()[:-4])


DAMAGES = {
    "names files that are missing: model-00002-of-.*; fetch them": lambda folder: shards_of(folder)[1].unlink(),
    "is not in model-00001-of-.*; fetch shards and index again": drop_a_tensor,
    "is in two shards, model-00001-of-.* and model-00002-of-.*; fetch shards and index": repeat_a_tensor,
    r"txt_in\.proj\.bias is not in the index; fetch": lambda folder: rewritten(
        folder / INDEX, lambda index: index["weight_map"].pop("txt_in.proj.bias")
    ),
    r"txt_in\.proj\.bias lies in '\.\./x', which is no file beside it": lambda folder: rewritten(
        folder / INDEX, lambda index: index["weight_map"].update({"txt_in.proj.bias": "../x"})
    ),
    "no weight_map of tensors and files": lambda folder: rewritten(folder / INDEX, dict.clear),
    "not a valid index .*; fetch it again": lambda folder: (folder / INDEX).write_text("[1"),
    "model-00002-of-.*: not a readable safetensors file .*; fetch it again": cut_short,
    "has both model.safetensors and model.safetensors.index.json; delete": lambda folder: save_file(
        {}, folder / "model.safetensors"
    ),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_shards_that_do_not_fit_together_are_named(sharded: Path, message: str) -> None:
    DAMAGES[message](sharded / "cola_dit")
    with pytest.raises(PublishedError, match=message) as caught:
        PublishedModel(sharded)
    assert str(sharded / "cola_dit") in str(caught.value) and "\n" not in str(caught.value)


def test_weights_of_another_type_are_refused(sharded: Path) -> None:
    path = shards_of(sharded / "cola_vae")[0]
    tensors = load_file(path)
    name = min(tensors)
    save_file(tensors | {name: tensors[name].double()}, path)
    with pytest.raises(PublishedError, match=rf"{name} is of type F64; weights are F32, F16, BF16"):
        PublishedModel(sharded)


def with_frequencies(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    change_tensors(folder / "cola_dit", lambda tensors: tensors.update({FREQUENCIES: change(tensors[FREQUENCIES])}))
    return folder


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """The golden model in one file for each network."""
    config, weights = read_published(GOLDEN)
    write_published(tmp_path / "single", config, HeldWeights(weights), GOLDEN / "tokenizer.json")
    return tmp_path / "single"


@pytest.mark.parametrize(
    "change",
    [
        lambda frequencies: frequencies * (1 + 1e-4),
        lambda frequencies: frequencies[:-1],
        lambda frequencies: frequencies.bfloat16() * 1.02,
        lambda frequencies: torch.full_like(frequencies, math.nan),
    ],
)
def test_other_rotary_frequencies_are_another_model(single: Path, change: Callable) -> None:
    with pytest.raises(PublishedError, match=rf"{FREQUENCIES} is not 1 / 10000\^\(2i / 12\).*another model"):
        PublishedModel(with_frequencies(single, change))


@pytest.mark.parametrize("stored_in_float32", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_the_type_that_rotary_frequencies_are_rounded_to_is_understood(
    single: Path, precision: str, stored_in_float32: bool
) -> None:
    def rounded(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".freqs")]:
            frequencies = tensors[name].to(getattr(torch, precision))
            tensors[name] = frequencies.float() if stored_in_float32 else frequencies

    change_tensors(single / "cola_dit", rounded)
    assert PublishedModel(single).config.dit.rotary_precision == precision


def test_frequencies_that_differ_in_a_last_place_are_the_formula_s(single: Path) -> None:
    with_frequencies(single, lambda frequencies: frequencies.nextafter(torch.tensor(9.0)))
    assert PublishedModel(single).config == PublishedModel(GOLDEN).config


def test_layers_with_frequencies_of_several_types_are_named(single: Path) -> None:
    message = rf"rounded are {FREQUENCIES} to bfloat16 and .* to float32; one type must hold for all layers"
    with pytest.raises(PublishedError, match=message):
        PublishedModel(with_frequencies(single, torch.Tensor.bfloat16))


def test_rotary_frequencies_belong_to_layers_of_the_prior(single: Path) -> None:
    extra = "blocks.7.msa.rope.rope.freqs"
    change_tensors(single / "cola_dit", lambda tensors: tensors.update({extra: tensors[FREQUENCIES].clone()}))
    with pytest.raises(PublishedError, match=rf"unknown tensors \['{extra}'\]"):
        PublishedModel(single)
