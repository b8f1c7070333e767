"""Published weights through a checkpoint and back: no bit, name, type or config value is lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cola_megatron.checkpoint.load import read_weights
from cola_megatron.checkpoint.reshard import reshard
from cola_megatron.checkpoint.state_file import read_state
from cola_megatron.compare_models import compare_models
from cola_megatron.config import ConfigError
from cola_megatron.conversion.export_checkpoint import export_checkpoint
from cola_megatron.conversion.import_weights import import_weights
from cola_megatron.families.cola.published import PublishedModel, write_published
from cola_megatron.interface import ColaDLM
from cola_megatron.interop.weight_source import HeldWeights
from tests.ranks import run_ranks
from tests.test_cli import cola
from tests.test_golden import GOLDEN as GOLDEN_TENSORS
from tests.test_golden import RELATIVE, noisy_copy
from tests.test_interchange_files import FREQUENCIES, assert_same_files
from tests.test_interop import GOLDEN, PARTS, VARIANTS, change_tensors, random_weights, variant_config

# What a preset must be told so that a variant can be trained with it.
OVERRIDES = {
    "no_variation": ["objective.vae.beta=0", "objective.reference_weight=0"],
    "no_variation_nor_mean_norm": ["objective.vae.beta=0", "objective.reference_weight=0"],
    "block_larger_than_the_prior's": ["stage=1"],  # nothing else can be trained with such a VAE
}


def there_and_back(published: Path, folder: Path, *overrides: str) -> Path:
    """import -> reshard -> export."""
    import_weights(published, folder / "imported", "tiny", list(overrides), progress=False)
    reshard(folder / "imported", folder / "resharded", ranks=2, progress=False)
    export_checkpoint(folder / "resharded", folder / "exported", max_shard_bytes=10**5, progress=False)
    return folder / "exported"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The golden model, to be changed."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "model"))


def golden_answers(checkpoint: Path, tensor_parallel_size: int, exported: Path) -> dict[str, np.ndarray]:
    """What a checkpoint computes from the golden inputs, by the names of the golden answers; and its export."""
    model = ColaDLM.from_checkpoint(checkpoint, device="cpu", tensor_parallel_size=tensor_parallel_size)
    model.save_published(exported, max_shard_bytes=10**5)
    return outputs(model)


def outputs(model: ColaDLM) -> dict[str, np.ndarray]:
    """Arrays in place of tensors, which would cross processes as open files."""
    found = {}
    for text in range(3):
        mean, logvar = model.encode(GOLDEN_TENSORS[f"encode.{text}.ids"])
        found |= {f"encode.{text}.mean": mean.numpy(), f"encode.{text}.logvar": logvar.numpy()}
    lengths = GOLDEN_TENSORS["decode.lengths"].tolist()
    found["decode.logits"] = model.decode(GOLDEN_TENSORS["decode.z"], lengths).numpy()
    velocity = model.velocity(GOLDEN_TENSORS["train.z0"], noisy_copy(), GOLDEN_TENSORS["train.t"])
    return found | {"train.velocity_noisy": velocity.numpy()}


def assert_golden(found: dict[str, np.ndarray]) -> None:
    for name, value in found.items():
        golden = GOLDEN_TENSORS[name].numpy()
        assert np.abs(value - golden).max() <= RELATIVE * np.abs(golden).max(), name


def test_the_golden_numbers_survive_two_processes_and_the_way_back(tmp_path: Path) -> None:
    exported = there_and_back(GOLDEN, tmp_path)
    for found in run_ranks(golden_answers, 2, tmp_path / "resharded", 2, tmp_path / "of_two_processes"):
        assert_golden(found)
    assert_golden(outputs(ColaDLM.from_published(exported)))
    assert_same_files(exported, GOLDEN)
    comparison = compare_models(tmp_path / "of_two_processes", exported, progress=False)
    assert not comparison.distances and comparison.equal(tolerance=0.0)
    assert (exported / "tokenizer.json").read_bytes() == (GOLDEN / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_goes_through_a_checkpoint_without_loss(tmp_path: Path, variant: str) -> None:
    config = variant_config(variant)
    published = tmp_path / "published"
    write_published(published, config, HeldWeights(random_weights(config)), GOLDEN / "tokenizer.json")
    exported = there_and_back(published, tmp_path, *OVERRIDES.get(variant, []))
    assert_same_files(exported, published)
    for second in (exported, tmp_path / "imported", tmp_path / "resharded"):
        found = compare_models(published, second, progress=False)
        assert found.equal(), found
        assert [each.absolute for each in found.outputs] == 4 * [0.0]


def test_a_variant_that_a_preset_cannot_train_is_named(tmp_path: Path) -> None:
    config = variant_config("no_variation")
    write_published(tmp_path / "published", config, HeldWeights(random_weights(config)), None)
    with pytest.raises(ConfigError, match=r"objective\.vae\.beta=.* needs model\.vae\.variational=true"):
        there_and_back(tmp_path / "published", tmp_path)


def test_a_checkpoint_of_ours_comes_back_with_its_bits(tmp_path: Path) -> None:
    """Also those that a detour through text or another type would lose."""
    config = variant_config("several")
    weights = random_weights(config)
    special = torch.tensor([-0.0, 1e-42, -1e-45, 3.4e38, torch.pi, 1 + 2**-23])
    weights["dit.input.bias"][: len(special)] = special
    write_published(tmp_path / "published", config, HeldWeights(weights), None)
    there_and_back(tmp_path / "published", tmp_path)
    import_weights(tmp_path / "exported", tmp_path / "again", "tiny", [], progress=False)
    for name, weight in read_weights(tmp_path / "again")[1].items():
        assert torch.equal(weight.view(torch.int32), weights[name].view(torch.int32)), name


def half(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({name: tensor.half() for name, tensor in tensors.items()})


def bfloat16(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})


def mixed(tensors: dict[str, torch.Tensor]) -> None:
    """Norms and frequencies in float32, as mixed-precision exports have them."""
    tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items() if tensor.dim() > 1})
    tensors["txt_in.proj.bias" if "txt_in.proj.bias" in tensors else "decoder.in_layer.bias"].mul_(0.1)


@pytest.mark.parametrize("change", [half, bfloat16, mixed])
def test_an_untrained_import_is_exported_in_the_types_it_came_in(
    copied: Path, tmp_path: Path, change: Callable
) -> None:
    for part in PARTS:
        change_tensors(copied / part, change)
    exported = there_and_back(copied, tmp_path)
    assert_same_files(exported, copied)
    assert compare_models(copied, tmp_path / "resharded", progress=False).equal()


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_another_type_is_written_when_it_is_asked_for(
    copied: Path, tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    for part in PARTS:
        change_tensors(copied / part, half)
    import_weights(copied, tmp_path / "imported", "tiny", [], progress=False)
    cola("convert", "export", tmp_path / "imported", tmp_path / "exported", "--precision", precision)
    for part in PARTS:
        original = load_file(copied / part / "model.safetensors")
        for name, tensor in load_file(tmp_path / "exported" / part / "model.safetensors").items():
            expected = original[name] if name.endswith(".freqs") else original[name].float().to(dtype)
            assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name
        config = json.loads((tmp_path / "exported" / part / "config.json").read_text())
        assert config["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(FREQUENCIES),
        lambda tensors: tensors.update({name: tensors[name].bfloat16() for name in tensors if "freqs" in name}),
        lambda tensors: tensors.update({FREQUENCIES: tensors[FREQUENCIES].nextafter(torch.tensor(9.0))}),
    ],
)
def test_rotary_frequencies_come_back_as_they_were_or_not_at_all(
    copied: Path, tmp_path: Path, change: Callable
) -> None:
    change_tensors(copied / "cola_dit", change)
    assert_same_files(there_and_back(copied, tmp_path), copied)


def test_config_values_that_we_do_not_use_come_back(copied: Path, tmp_path: Path) -> None:
    path = copied / "cola_dit" / "config.json"
    config = json.loads(path.read_text())
    config |= {"auto_map": {"AutoModel": "cola.ColaDiTModel"}, "transformers_version": "5.0", "expand_ratio": 4.0}
    config["torch_dtype"] = config.pop("dtype")
    del config["patch_size"]  # 1 is its only value
    path.write_text(json.dumps(config))
    exported = there_and_back(copied, tmp_path)
    again = (exported / "cola_dit" / "config.json").read_text()
    assert json.loads(again) == config and '"expand_ratio": 4.0' in again
    cola("convert", "export", tmp_path / "imported", tmp_path / "bf16", "--precision", "bf16")
    narrow = json.loads((tmp_path / "bf16" / "cola_dit" / "config.json").read_text())
    assert narrow == config | {"torch_dtype": "bfloat16"}


@pytest.mark.parametrize("named", ["", "cola_vae"])
def test_a_vae_alone_goes_through_a_checkpoint_of_stage_one(copied: Path, tmp_path: Path, named: str) -> None:
    shutil.rmtree(copied / "cola_dit")
    import_weights(copied / named, tmp_path / "imported", "tiny", [], progress=False)
    assert read_state(tmp_path / "imported")["config"]["stage"] == 1
    export_checkpoint(tmp_path / "imported", tmp_path / "exported", progress=False)
    assert not (tmp_path / "exported" / "cola_dit").exists()
    assert compare_models(copied / named, tmp_path / "exported", progress=False).equal()
    assert ColaDLM.from_published(tmp_path / "exported").dit is None


def test_a_resharded_import_keeps_its_tokenizer_when_the_import_is_deleted(tmp_path: Path) -> None:
    import_weights(GOLDEN, tmp_path / "imported", "tiny", [], progress=False)
    cola("convert", "reshard", tmp_path / "imported", tmp_path / "resharded", "--ranks", 3)
    shutil.rmtree(tmp_path / "imported")
    assert ColaDLM.from_checkpoint(tmp_path / "resharded").tokenizer is not None
    (tmp_path / "resharded").rename(tmp_path / "moved")
    cola("convert", "export", tmp_path / "moved", tmp_path / "exported")
    assert PublishedModel(tmp_path / "exported").tokenizer is not None


def test_an_import_that_fails_leaves_no_checkpoint(copied: Path, tmp_path: Path) -> None:
    path = copied / "cola_vae" / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if "norm" not in name}, path)
    with pytest.raises(ValueError, match=r"missing tensors \['decoder\.blocks\.0\.k_norm\.bias'"):
        import_weights(copied, tmp_path / "imported", "tiny", [], progress=False)
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("size", ["5", "0GB", "5gb", "-1GB", "1.5GB"])
def test_a_shard_size_that_is_none_is_named(tmp_path: Path, size: str) -> None:
    import_weights(GOLDEN, tmp_path / "imported", "tiny", [], progress=False)
    with pytest.raises(ConfigError, match=rf"--max-shard-size={size} must be a positive number with a unit"):
        cola("convert", "export", tmp_path / "imported", tmp_path / "exported", f"--max-shard-size={size}")
    assert not (tmp_path / "exported").exists()
