"""Weights from and to the published LLaDA layout: its names, every bit, and what its own forward pass computes.

Shapes: L tokens, H hidden, A heads, D head channels, V vocabulary.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from cola_megatron.config import ModelConfig, load_config
from cola_megatron.config.masked_diffusion import MaskedDiffusionModelConfig
from cola_megatron.config.transformer import TransformerConfig
from cola_megatron.conversion.export_checkpoint import export_checkpoint
from cola_megatron.conversion.import_weights import import_weights
from cola_megatron.families.masked_diffusion.language_model import MaskedDiffusionLM
from cola_megatron.families.masked_diffusion.llada import LLaDAFormat
from cola_megatron.interface import load_model
from cola_megatron.interop.errors import PublishedError
from cola_megatron.interop.weight_source import HeldWeights

MASK, VOCABULARY = 45, 50
CONFIG = {
    "activation_type": "silu",
    "alibi": False,
    "architectures": ["LLaDAModelLM"],
    "attention_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 32,
    "embedding_size": VOCABULARY,
    "eos_token_id": 1,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": MASK,
    "max_sequence_length": 64,
    "mlp_hidden_size": 48,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "vocab_size": VOCABULARY,
    "weight_tying": False,
}
# The names of the published tensors, as they lie in its index, and the shapes that the sizes above give them.
GOLDEN = {
    "model.transformer.wte.weight": (50, 32),
    "model.transformer.ln_f.weight": (32,),
    "model.transformer.ff_out.weight": (50, 32),
    **{
        f"model.transformer.blocks.{layer}.{name}.weight": shape
        for layer in range(2)
        for name, shape in {
            "attn_norm": (32,),
            "q_proj": (32, 32),
            "k_proj": (16, 32),
            "v_proj": (16, 32),
            "attn_out": (32, 32),
            "ff_norm": (32,),
            "ff_proj": (48, 32),
            "up_proj": (48, 32),
            "ff_out": (32, 48),
        }.items()
    },
}


class Held(HeldWeights):
    """A trained model in memory: nothing is known of a file that it came from."""

    imported = None
    tokenizer = None

    def __init__(self, config: ModelConfig, tensors: dict[str, torch.Tensor]):
        super().__init__(tensors)
        self.config = config


def folder_of(
    folder: Path, dtype: torch.dtype = torch.float32, config: dict | None = None
) -> tuple[Path, dict[str, torch.Tensor]]:
    """A tiny model in the layout, and its tensors."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: ((1 if len(shape) == 1 else 0) + 0.3 * torch.randn(shape, generator=generator)).to(dtype)
        for name, shape in GOLDEN.items()
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder, tensors


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def llada(tensors: dict[str, torch.Tensor], tokens_L: torch.Tensor) -> torch.Tensor:
    """Its forward pass, in the published names: logits (L, V)."""

    def norm(x_LH: torch.Tensor, name: str) -> torch.Tensor:
        return x_LH / (x_LH.square().mean(-1, keepdim=True) + 1e-5).sqrt() * tensors[f"model.transformer.{name}.weight"]

    def rotated(x_LAD: torch.Tensor) -> torch.Tensor:
        first, second = x_LAD.chunk(2, dim=-1)
        frequency_D = 500000.0 ** (-torch.arange(0, 8, 2) / 8)
        angle_L1D = (torch.arange(len(x_LAD))[:, None] * frequency_D)[:, None]
        return torch.cat(
            (first * angle_L1D.cos() - second * angle_L1D.sin(), second * angle_L1D.cos() + first * angle_L1D.sin()), -1
        )

    x_LH = tensors["model.transformer.wte.weight"][tokens_L]
    for layer in range(2):

        def product(name: str, x_LH: torch.Tensor, layer: int = layer) -> torch.Tensor:
            return x_LH @ tensors[f"model.transformer.blocks.{layer}.{name}.weight"].T

        y_LH = norm(x_LH, f"blocks.{layer}.attn_norm")
        q, k, v = (product(f"{name}_proj", y_LH).unflatten(1, (-1, 8)) for name in "qkv")
        k, v = (shared.repeat_interleave(2, dim=1) for shared in (rotated(k), v))
        scores_ALL = torch.einsum("iad,jad->aij", rotated(q), k) / 8**0.5
        x_LH = x_LH + product("attn_out", torch.einsum("aij,jad->iad", scores_ALL.softmax(-1), v).flatten(1))
        y_LH = norm(x_LH, f"blocks.{layer}.ff_norm")
        x_LH = x_LH + product("ff_out", F.silu(product("ff_proj", y_LH)) * product("up_proj", y_LH))
    return norm(x_LH, "ln_f") @ tensors["model.transformer.ff_out.weight"].T


def test_our_network_computes_what_its_own_does(tmp_path):
    folder, tensors = folder_of(tmp_path / "llada")
    model = load_model(folder, device="cpu")
    assert isinstance(model, MaskedDiffusionLM) and model.config.mask_id == MASK
    ids = [3, 8, MASK, 12, MASK, MASK, 49, 0, 7]
    torch.testing.assert_close(model.logits(ids), llada(tensors, torch.tensor(ids)), rtol=1e-4, atol=1e-5)


def test_a_model_of_its_weights_generates_as_its_own_loop_does(tmp_path):
    """Eight tokens in two blocks, of which every step keeps two: n most confident of each, predicted by all others."""
    folder, tensors = folder_of(tmp_path / "llada")
    prompt, block = [3, 8, 12, 49, 7], 4
    x_L = torch.tensor([*prompt, *[MASK] * 8])
    for start in (5, 9):
        for _ in range(2):
            logits_LV = llada(tensors, x_L)
            logits_LV[:, MASK] = -torch.inf
            sure_L, ids_L = logits_LV.double().softmax(-1).max(-1)
            outside_L = (torch.arange(len(x_L)) < start) | (torch.arange(len(x_L)) >= start + block)
            chosen = sure_L.masked_fill((x_L != MASK) | outside_L, -1).topk(2).indices
            x_L[chosen] = ids_L[chosen]
    (found,) = load_model(folder, device="cpu").generate([prompt], max_new_tokens=8, steps=4, block_length=block)
    assert found.token_ids.tolist() == x_L[5:].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 4_000])
def test_a_folder_that_is_imported_and_exported_is_the_same_bit_for_bit(tmp_path, dtype, max_shard_bytes):
    folder, tensors = folder_of(tmp_path / "llada", dtype)
    import_weights(folder, tmp_path / "imported", "tiny-masked-diffusion", [], progress=False)
    export_checkpoint(tmp_path / "imported", tmp_path / "exported", max_shard_bytes=max_shard_bytes, progress=False)
    found: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "exported").glob("*.safetensors"):
        found |= load_file(file)
    assert_equal(found, tensors)
    assert json.loads((tmp_path / "exported" / "config.json").read_text()) == CONFIG
    config = load_config(tmp_path / "imported" / "config.yaml")
    assert (config.model.vocab_size, config.model.mask_token_id) == (VOCABULARY, MASK)


@pytest.mark.parametrize("mask_token_id", [None, 7])
def test_a_model_of_ours_that_is_written_and_read_is_the_same_bit_for_bit(tmp_path, mask_token_id):
    network = TransformerConfig(num_layers=1, hidden_size=32, ffn_hidden_size=40, num_attention_heads=4)
    config = MaskedDiffusionModelConfig(vocab_size=20, mask_token_id=mask_token_id, transformer=network)
    layout, generator = LLaDAFormat(), torch.Generator().manual_seed(1)
    shapes = {
        "embedding.weight": (20 + config.extra_rows, 32),
        "blocks.0.attention_norm.weight": (32,),
        "blocks.0.attention.qkv.weight": (96, 32),
        "blocks.0.attention.output.weight": (32, 32),
        "blocks.0.ffn_norm.weight": (32,),
        "blocks.0.ffn.input.weight": (80, 32),
        "blocks.0.ffn.output.weight": (32, 40),
        "norm.weight": (32,),
        "head.linear.weight": (20, 32),
    }
    weights = {f"transformer.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    layout.write(tmp_path / "written", Held(config, weights))
    opened = layout.open(tmp_path / "written")
    assert opened.config == config and opened.shapes == {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert_equal({name: opened.read(name) for name in opened.shapes}, weights)
    # [MASK] of our own has a row in both of its tables; that of the head is zero.
    written = load_file(tmp_path / "written" / "model.safetensors")["model.transformer.ff_out.weight"]
    assert len(written) == 20 + config.extra_rows and (mask_token_id is not None or not written[-1].any())
    if mask_token_id is None:
        stored = load_file(tmp_path / "written" / "model.safetensors")
        stored["model.transformer.ff_out.weight"][-1, 3] = 1
        save_file(stored, tmp_path / "written" / "model.safetensors", {"format": "pt"})
        with pytest.raises(PublishedError, match=r"has a row for \[MASK\], which is beyond vocab_size"):
            layout.open(tmp_path / "written")


def test_what_the_layout_does_not_hold_is_refused(tmp_path):
    config = MaskedDiffusionModelConfig(vocab_size=20, block_size=8)
    with pytest.raises(PublishedError, match="block_size=8: LLaDA denoises whole sequences"):
        LLaDAFormat().write(tmp_path / "blocks", Held(config, {}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alibi": True}, "alibi=True cannot be held; it must be False"),
        ({"layer_norm_type": "default"}, "layer_norm_type='default' cannot be held; it must be 'rms'"),
        ({"weight_tying": True}, "weight_tying=True cannot be held"),
        ({"mask_token_id": None}, "mask_token_id is missing"),
        ({"mask_token_id": 99}, "mask_token_id=99 must be a token of the vocabulary"),
        ({"n_heads": 5}, "hidden_size=32 must be divisible by num_attention_heads"),
        ({"embedding_size": 64}, r"wte.weight has shape \(50, 32\), its config asks for \(64, 32\)"),
        ({"n_layers": 3}, "missing tensors"),
    ],
)
def test_a_folder_that_is_something_else_is_refused_in_one_line(tmp_path, change, message):
    folder, _ = folder_of(tmp_path / "llada", config={**CONFIG, **change})
    with pytest.raises(PublishedError, match=message) as error:
        load_model(folder, device="cpu")
    assert "\n" not in str(error.value)


def test_a_prompt_that_holds_its_mask_is_refused_by_number(tmp_path):
    folder, _ = folder_of(tmp_path / "llada")
    model = load_model(folder, device="cpu")
    with pytest.raises(ValueError, match=r"prompts\[0\] holds token id 45, which is \[MASK\]"):
        model.generate([[3, MASK]], max_new_tokens=2)
    with pytest.raises(ValueError, match=r"token id 45, which is \[MASK\]"):
        model.log_likelihood([[3, MASK]], samples=1)
