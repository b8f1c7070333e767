"""The published layout: what is read and written back, what is refused, and configurations without golden numbers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cola_megatron.config import ColaModelConfig, DiTConfig, VAEConfig
from cola_megatron.families.cola.published import PublishedModel, read_published, write_published
from cola_megatron.interface import ColaDLM
from cola_megatron.interop.errors import PublishedError
from cola_megatron.interop.weight_source import HeldWeights
from cola_megatron.models.dit import DiT
from cola_megatron.models.text_vae import TextVAE
from cola_megatron.parallel import initialize_parallel, initialize_parameters

GOLDEN = Path(__file__).parent / "data" / "reference_tiny"
PARTS = ("cola_vae", "cola_dit")
# Keys that say nothing about the model.
IGNORED = {"architectures", "dtype", "torch_dtype", "transformers_version", "auto_map", "_name_or_path"}

VAE = {
    "encoder_layers": 1,
    "decoder_layers": 1,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "latent_dim": 8,
    "block_size": 4,
}
DIT = {
    "num_layers": 1,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "head_dim": 16,
    "latent_dim": 8,
    "block_size": 4,
    "rotary_dim": 12,
}
# name -> what differs from VAE and from DIT
VARIANTS = {
    "patch_2": ({"patch_size": 2}, {}),
    "pre_norm": ({"post_norm": False}, {}),
    "qkv_bias": ({"qkv_bias": True}, {"qkv_bias": True}),
    "no_bias": ({"bias": False}, {}),
    "no_affine": ({"norm_affine": False, "query_key_norm_affine": False}, {}),
    "no_query_key_norm": ({"query_key_norm": False}, {}),
    "no_variation": ({"variational": False}, {}),
    "no_mean_norm": ({"mean_norm": False}, {}),
    "no_variation_nor_mean_norm": ({"variational": False, "mean_norm": False}, {}),
    "block_smaller_than_the_prior's": ({"block_size": 1}, {}),
    "block_larger_than_the_prior's": ({"block_size": 8}, {}),
    "shifted_and_scaled": ({"shifting_factor": 0.3, "scaling_factor": 0.7}, {}),
    "rotary_over_the_whole_head": ({}, {"rotary_dim": 16}),
    "rotary_over_two_channels": ({}, {"rotary_dim": 2}),
    "expanded_twice": ({}, {"ffn_expansion": 2}),
    "heads_wider_than_the_prior": ({}, {"num_attention_heads": 4}),
    "feed_forward_that_the_heads_do_not_divide": ({"ffn_hidden_size": 60}, {}),
    "rounded_rotary_frequencies": ({}, {"rotary_precision": "bfloat16"}),
    "several": (
        {"patch_size": 2, "post_norm": False, "qkv_bias": True, "bias": False, "block_size": 2},
        {"qkv_bias": True, "rotary_dim": 8, "ffn_expansion": 3, "norm_eps": 1e-6},
    ),
}


def variant_config(variant: str) -> ColaModelConfig:
    """A tiny architecture with the tokenizer of the golden model."""
    vae, dit = VARIANTS[variant]
    return ColaModelConfig(vocab_size=320, vae=VAEConfig(**(VAE | vae)), dit=DiTConfig(**(DIT | dit)))


def published_config(folder: Path) -> dict:
    config = json.loads((folder / "config.json").read_text())
    return {name: value for name, value in config.items() if name not in IGNORED}


def random_weights(config: ColaModelConfig) -> dict[str, torch.Tensor]:
    """Starting weights plus noise, so that nothing is left at zero or one."""
    groups = initialize_parallel()
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for prefix, network in (("vae", TextVAE(config.vocab_size, config.vae, groups)), ("dit", DiT(config.dit, groups))):
        initialize_parameters(network, 1, groups)
        for name, tensor in network.state_dict().items():
            weights[f"{prefix}.{name}"] = tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
    return weights


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The golden model, to be broken."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "model"))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_published_model_is_written_back_bit_for_bit(tmp_path: Path) -> None:
    config, weights = read_published(GOLDEN)
    write_published(tmp_path, config, HeldWeights(weights), GOLDEN / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == (GOLDEN / "tokenizer.json").read_bytes()
    for part in PARTS:
        assert published_config(tmp_path / part) == published_config(GOLDEN / part)
        ours, theirs = (load_file(folder / part / "model.safetensors") for folder in (tmp_path, GOLDEN))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(ours[name], tensor), name
    config_again, weights_again = read_published(tmp_path)
    assert config_again == config
    assert weights_again.keys() == weights.keys()
    assert all(torch.equal(weights_again[name], tensor) for name, tensor in weights.items())


def test_half_precision_files_are_read_as_float32(tmp_path: Path) -> None:
    config, weights = read_published(GOLDEN)
    write_published(tmp_path, config, HeldWeights(weights), None, torch.bfloat16)
    assert json.loads((tmp_path / "cola_vae" / "config.json").read_text())["dtype"] == "bfloat16"
    config_again, weights_again = read_published(tmp_path)
    assert config_again == config
    assert all(torch.equal(weights_again[name], weight.bfloat16().float()) for name, weight in weights.items())


@pytest.mark.parametrize(
    ("part", "name"), [("cola_vae", "decoder.final_norm.bias"), ("cola_dit", "blocks.1.msa.proj_qkv.weight")]
)
def test_a_missing_tensor_is_named(copied: Path, part: str, name: str) -> None:
    change_tensors(copied / part, lambda tensors: tensors.pop(name))
    with pytest.raises(PublishedError, match=rf"{part}.*missing tensors \['{name}'\], unknown tensors none"):
        read_published(copied)


@pytest.mark.parametrize("part", PARTS)
def test_an_unknown_tensor_is_named(copied: Path, part: str) -> None:
    change_tensors(copied / part, lambda tensors: tensors.update({"blocks.0.extra": torch.zeros(2)}))
    with pytest.raises(PublishedError, match=rf"{part}.*missing tensors none, unknown tensors \['blocks.0.extra'\]"):
        read_published(copied)


def test_a_tensor_of_another_shape_is_named(copied: Path) -> None:
    name = "blocks.1.msa.proj_qkv.weight"
    change_tensors(copied / "cola_dit", lambda tensors: tensors.update({name: torch.zeros(192, 32)}))
    with pytest.raises(PublishedError, match=rf"{name} has shape \(192, 32\), its config asks for \(192, 64\)"):
        read_published(copied)


@pytest.mark.parametrize(
    ("part", "key", "value", "complaint"),
    [
        ("cola_vae", "clip_qkv", 1.0, "clip_qkv=1.0 is not supported; it must be None"),
        ("cola_vae", "shared_heads_kv", 2, "shared_heads_kv=2 is not supported; it must be 1"),
        ("cola_vae", "window", 3, "unknown keys window"),
        ("cola_vae", "dim", 30, "hidden_size"),
        ("cola_dit", "patch_size", 2, "patch_size=2 is not supported; it must be 1"),
        ("cola_dit", "txt_out_channels", 4, "txt_out_channels=4 must equal txt_in_channels=8"),
        ("cola_dit", "window", 3, "unknown keys window"),
    ],
)
def test_an_option_that_we_lack_is_named(copied: Path, part: str, key: str, value: object, complaint: str) -> None:
    path = copied / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(PublishedError) as caught:
        read_published(copied)
    assert str(path) in str(caught.value)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_option_that_is_not_written_has_the_published_default(copied: Path) -> None:
    config = read_published(copied)[0]
    for part, keys in (("cola_vae", ("post_norm", "layer_norm_eps", "block_size")), ("cola_dit", ("norm_eps",))):
        path = copied / part / "config.json"
        written = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in written.items() if key not in keys}))
    assert read_published(copied)[0] == config
    (copied / "cola_dit" / "config.json").write_text("{}")
    with pytest.raises(PublishedError, match="cola_dit"):
        read_published(copied)  # the default is another size: the tensors do not fit it


@pytest.mark.parametrize(
    ("key", "value"), [("causal", True), ("use_emb", False), ("init_cutoff_factor", None), ("_attention", "eager")]
)
def test_an_option_without_effect_changes_nothing(copied: Path, key: str, value: object) -> None:
    path = copied / "cola_vae" / "config.json"
    config = read_published(copied)[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert read_published(copied)[0] == config


def test_the_published_download_is_read_as_it_comes(tmp_path: Path) -> None:
    """tokenizer.json beside cola_dlm/, which holds both networks."""
    shutil.copytree(GOLDEN, tmp_path / "download" / "cola_dlm")
    (tmp_path / "download" / "cola_dlm" / "tokenizer.json").rename(tmp_path / "download" / "tokenizer.json")
    for folder in (tmp_path / "download", tmp_path / "download" / "cola_dlm"):
        model = PublishedModel(folder)
        assert model.has_prior and model.tokenizer == tmp_path / "download" / "tokenizer.json"


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_missing_or_broken_file_is_named(copied: Path, part: str, file: str) -> None:
    path = copied / part / file
    path.write_bytes(b"{ not a file of this kind")
    with pytest.raises(PublishedError, match=f"{part}/{file}: not "):
        read_published(copied)
    path.unlink()
    with pytest.raises(PublishedError, match=f"{part}/{file}: no such file"):
        read_published(copied)


def test_a_model_without_published_form_is_not_written(tmp_path: Path) -> None:
    config, weights = read_published(GOLDEN)
    fixed = config.model_copy(update={"vae": config.vae.model_copy(update={"fixed_logsnr": 1.0})})
    with pytest.raises(PublishedError, match=r"fixed_logsnr=1\.0"):
        write_published(tmp_path / "fixed", fixed, HeldWeights(weights), None)
    name = "vae.decoder.norm.weight"
    less = HeldWeights({other: weight for other, weight in weights.items() if other != name})
    with pytest.raises(PublishedError, match=r"missing tensors \['vae\.decoder\.norm\.weight'\], unknown tensors none"):
        write_published(tmp_path / "less", config, less, None)
    for unknown in ("vae.decoder.norm.extra", "optimizer.step"):
        more = HeldWeights(weights | {unknown: weights[name]})
        with pytest.raises(PublishedError, match=rf"missing tensors none, unknown tensors \['{unknown}'\]"):
            write_published(tmp_path / "more", config, more, None)
    narrow = HeldWeights(weights | {name: weights[name][1:]})
    with pytest.raises(
        PublishedError, match=r"vae\.decoder\.norm\.weight has shape \(63,\), its config asks for \(64,\)"
    ):
        write_published(tmp_path / "narrow", config, narrow, None)
    assert not list(tmp_path.iterdir())


def test_parts_of_another_model_are_not_mixed_in(copied: Path) -> None:
    config, weights = read_published(copied)
    alone = HeldWeights({name: weight for name, weight in weights.items() if name.startswith("vae.")})
    with pytest.raises(PublishedError, match=r"cola_dit is of another model: this one has none; give a new folder"):
        write_published(copied, config, alone, copied / "tokenizer.json")
    with pytest.raises(PublishedError, match=r"tokenizer\.json is of another model"):
        write_published(copied, config, HeldWeights(weights), None)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_survives_the_published_layout(tmp_path: Path, variant: str) -> None:
    """Written and read again it is the same function, and it generates."""
    config = variant_config(variant)
    model = ColaDLM(config, random_weights(config), GOLDEN / "tokenizer.json")
    model.save_published(tmp_path)
    again = ColaDLM.from_published(tmp_path)
    assert again.config == config
    for network, other in ((model.vae, again.vae), (model.dit, again.dit)):
        weights, weights_again = network.state_dict(), other.state_dict()
        assert weights.keys() == weights_again.keys()
        assert all(torch.equal(weights_again[name], weight) for name, weight in weights.items())

    generator = torch.Generator().manual_seed(3)
    z_clean, z_noisy = torch.randn(2, 1, 12, 8, generator=generator)
    ids = torch.randint(0, 320, (16,), generator=generator)
    prompts = ["", "the", "the prior carries meaning and the decoder writes words . a block"]

    def outputs(of: ColaDLM) -> list[torch.Tensor]:
        generations = of.generate(prompts, steps=2, max_new_tokens=12)
        return [
            *of.encode(ids),
            of.decode(z_noisy[0], [8, 4]),
            of.velocity(z_clean, z_noisy, torch.tensor([0.4])),
            *(generation.token_ids for generation in generations),
            *(generation.latents for generation in generations),
        ]

    first = outputs(model)
    for tensor, tensor_again in zip(first, outputs(again), strict=True):
        assert tensor.isfinite().all()
        assert torch.equal(tensor, tensor_again)
    patch = config.vae.patch_size
    mean, logvar, logits, velocity, *generated = first
    assert mean.shape == logvar.shape == (16 // patch, 8)
    assert logits.shape == (12 * patch, 320)
    assert velocity.shape == z_noisy.shape
    blocks = -(-12 // (4 * patch))
    assert [tensor.shape for tensor in generated] == 3 * [(blocks * 4 * patch,)] + 3 * [(blocks, 4, 8)]


@pytest.mark.parametrize("variant", ["patch_2", "pre_norm", "block_smaller_than_the_prior's", "several"])
def test_generation_decodes_a_variant_like_one_whole_pass(variant: str) -> None:
    """The tokens are those of `decode` over prompt and blocks, where the decoder's blocks divide the prior's."""
    config = variant_config(variant)
    model = ColaDLM(config, random_weights(config), GOLDEN / "tokenizer.json")
    prompt = "the prior carries meaning and the decoder writes words . a blo"
    ids = model.tokenizer.encode(prompt, add_special_tokens=False).ids
    tokens_per_block = config.dit.block_size * config.vae.patch_size
    assert len(ids) > tokens_per_block
    assert len(ids) % tokens_per_block, "the first block begins inside the prompt"
    (generation,) = model.generate([prompt], steps=2, max_new_tokens=20, repetition_penalty=1.0)
    whole = ids[: len(ids) // tokens_per_block * tokens_per_block]
    latents = torch.cat((model.vae.to_prior(model.encode(whole)[0]), generation.latents.flatten(0, 1)))
    expected = model.decode(latents, [len(latents)]).argmax(-1)[len(whole) :]
    assert torch.equal(generation.token_ids, expected)


def test_a_model_that_has_diverged_is_not_written(tmp_path: Path) -> None:
    config, weights = read_published(GOLDEN)
    weights["vae.encoder.embedding.weight"][0, 0] = float("nan")
    with pytest.raises(PublishedError, match=r"vae\.encoder\.embedding\.weight is not finite: the model has diverged"):
        write_published(tmp_path, config, HeldWeights(weights), None)
