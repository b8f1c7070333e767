"""Weights of the autoregressive family from and to Hugging Face folders: bit for bit, and transformers' own numbers.

The numbers in tests/data/llama_golden.json are transformers' (`tests/llama_folders.py`); the tests at the end ask
transformers itself, where it is installed.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cola_megatron.config import ModelConfig
from cola_megatron.families.autoregressive.huggingface import HuggingFaceLlama, HuggingFaceLlamaFormat
from cola_megatron.families.autoregressive.language_model import AutoregressiveLM
from cola_megatron.interface import load_model
from cola_megatron.interop.errors import PublishedError
from cola_megatron.interop.weight_source import HeldWeights
from tests.llama_folders import CASES, GOLDEN, NEW_TOKENS, PROMPT, write_folder

EXPECTED = json.loads(GOLDEN.read_text())
GROUPED = CASES["grouped queries"]
# Both sides are float32 and round differently; logits are of the order of 1.
LOGITS = 1e-5
TOKENIZER = Path(__file__).parent / "data" / "reference_tiny" / "tokenizer.json"


class Held(HeldWeights):
    """A trained model in memory: nothing is known of a file that it came from."""

    imported = None

    def __init__(self, config: ModelConfig, tensors: dict[str, torch.Tensor], tokenizer: Path | None = None):
        super().__init__(tensors)
        self.config, self.tokenizer = config, tokenizer


def read_all(source) -> dict[str, torch.Tensor]:
    return {name: source.read(name) for name in source.shapes}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_are_those_of_transformers(tmp_path, case):
    write_folder(tmp_path, CASES[case])
    model = load_model(tmp_path, device="cpu")
    assert isinstance(model, AutoregressiveLM)
    torch.testing.assert_close(model.logits(PROMPT), torch.tensor(EXPECTED[case]["logits"]), rtol=0, atol=LOGITS)
    (found,) = model.generate([PROMPT], max_new_tokens=NEW_TOKENS, repetition_penalty=1.0)
    assert found.token_ids.tolist() == EXPECTED[case]["greedy"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 3_000])
def test_a_folder_that_is_read_and_written_is_the_same_bit_for_bit(tmp_path, case, dtype, max_shard_bytes):
    stored = write_folder(tmp_path / "first", CASES[case], dtype)
    layout = HuggingFaceLlamaFormat()
    layout.write(tmp_path / "second", layout.open(tmp_path / "first"), max_shard_bytes=max_shard_bytes)
    found, files = {}, list((tmp_path / "second").glob("*.safetensors"))
    for file in files:
        found |= load_file(file)
    assert (len(files) > 1) == (max_shard_bytes < 10**9)
    assert_equal(found, stored)
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second"))
    assert first == second
    assert_equal(read_all(layout.open(tmp_path / "second")), read_all(layout.open(tmp_path / "first")))


@pytest.mark.parametrize("case", CASES)
def test_a_model_that_is_written_and_read_is_the_same_bit_for_bit(tmp_path, case):
    write_folder(tmp_path / "first", CASES[case])
    opened = HuggingFaceLlama(tmp_path / "first")
    trained = Held(opened.config, {name: tensor + 0.1 for name, tensor in read_all(opened).items()}, TOKENIZER)
    HuggingFaceLlamaFormat().write(tmp_path / "second", trained)
    again = HuggingFaceLlama(tmp_path / "second")
    assert again.config == trained.config
    assert_equal(read_all(again), trained.tensors)
    assert again.tokenizer is not None and again.tokenizer.read_bytes() == TOKENIZER.read_bytes()
    written = json.loads((tmp_path / "second" / "config.json").read_text())
    assert written["bos_token_id"] is None  # where the key is left out, transformers takes token 1 for it
    assert written["num_key_value_heads"] == CASES[case]["num_key_value_heads"]


def test_a_type_that_is_asked_for_is_that_of_every_tensor(tmp_path):
    write_folder(tmp_path / "first", GROUPED)
    layout = HuggingFaceLlamaFormat()
    layout.write(tmp_path / "second", layout.open(tmp_path / "first"), torch.bfloat16)
    tensors = load_file(tmp_path / "second" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "second" / "config.json").read_text())["dtype"] == "bfloat16"


def test_tied_embeddings_become_two_matrices_that_compute_the_same(tmp_path):
    tensors = write_folder(tmp_path / "tied", {**GROUPED, "tie_word_embeddings": True})
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "tied" / "model.safetensors")
    opened = HuggingFaceLlama(tmp_path / "tied")
    weights = read_all(opened)
    assert torch.equal(weights["transformer.head.linear.weight"], weights["transformer.embedding.weight"])
    HuggingFaceLlamaFormat().write(tmp_path / "untied", opened)
    written = load_file(tmp_path / "untied" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "untied" / "config.json").read_text())["tie_word_embeddings"] is False
    first, second = (load_model(tmp_path / name, device="cpu").logits(PROMPT) for name in ("tied", "untied"))
    assert torch.equal(first, second)


def test_buffers_of_old_folders_are_passed_over(tmp_path):
    tensors = write_folder(tmp_path, GROUPED)
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(2) for layer in range(2)}
    save_file({**tensors, **buffers}, tmp_path / "model.safetensors")
    assert len(HuggingFaceLlama(tmp_path).shapes) == 3 + 2 * 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type='mistral': only 'llama' can be read"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type='llama3': scaled rotary"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear': scaled rotary"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type='yarn': scaled rotary"),
        ({"rope_scaling": 3}, "rope_scaling=3 must be an object"),
        ({"attention_bias": True}, "attention_bias=True cannot be held; it must be False"),
        ({"mlp_bias": True}, "mlp_bias=True cannot be held; it must be False"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' cannot be held; it must be 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} cannot be held; it must be absent"),
        ({"head_dim": 8}, "head_dim=8 cannot be held; it must be hidden_size / num_attention_heads = 4"),
        ({"num_key_value_heads": 5}, "num_attention_heads=6 must be divisible by num_key_value_heads (5)"),
        ({"hidden_size": 25}, "hidden_size=25 must be divisible by num_attention_heads (6)"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 3}, "missing tensors ['model.layers.2.input_layernorm.weight'"),
        ({"num_hidden_layers": 1}, "unknown tensors ['model.layers.1.input_layernorm.weight'"),
        ({"vocab_size": 33}, "model.embed_tokens.weight has shape (32, 24), its config asks for (33, 24)"),
    ],
)
def test_what_cannot_be_held_is_refused_in_one_line(tmp_path, changes, message):
    write_folder(tmp_path, GROUPED)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(PublishedError) as refusal:
        HuggingFaceLlama(tmp_path)
    assert message in str(refusal.value) and str(tmp_path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_missing_size_and_a_broken_file_are_refused(tmp_path):
    write_folder(tmp_path, GROUPED)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["intermediate_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PublishedError, match="intermediate_size is missing"):
        HuggingFaceLlama(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(PublishedError, match="not valid JSON"):
        HuggingFaceLlama(tmp_path)


def test_a_model_that_is_not_finite_or_not_whole_is_not_written(tmp_path):
    write_folder(tmp_path / "first", GROUPED)
    opened = HuggingFaceLlama(tmp_path / "first")
    tensors = read_all(opened)
    broken = {**tensors, "transformer.norm.weight": torch.full((24,), torch.nan)}
    with pytest.raises(PublishedError, match=r"transformer\.norm\.weight is not finite"):
        HuggingFaceLlamaFormat().write(tmp_path / "second", Held(opened.config, broken))
    assert not list((tmp_path / "second").glob("*.safetensors"))
    del tensors["transformer.norm.weight"]
    with pytest.raises(PublishedError, match=r"missing tensors \['transformer\.norm\.weight'\]"):
        HuggingFaceLlamaFormat().write(tmp_path / "second", Held(opened.config, tensors))


# ---- transformers itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_from_our_folder_what_we_compute(tmp_path, case):
    pytest.importorskip("transformers")
    from transformers import AutoTokenizer, LlamaForCausalLM

    write_folder(tmp_path / "first", CASES[case])
    opened = HuggingFaceLlama(tmp_path / "first")
    HuggingFaceLlamaFormat().write(
        tmp_path / "ours", Held(opened.config, read_all(opened), TOKENIZER), max_shard_bytes=5_000
    )
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    ours = load_model(tmp_path / "ours", device="cpu")
    with torch.no_grad():
        logits = theirs(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(ours.logits(PROMPT), logits, rtol=0, atol=LOGITS)
    written = theirs.generate(torch.tensor([PROMPT]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    (found,) = ours.generate([PROMPT], max_new_tokens=NEW_TOKENS, repetition_penalty=1.0)
    assert written[0, len(PROMPT) :].tolist() == found.token_ids.tolist()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert tokenizer.encode("the prior", add_special_tokens=False) == ours.tokenizer.encode("the prior").ids


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_transformers_saves_is_read_and_written_bit_for_bit(tmp_path, kv_heads, dtype):
    pytest.importorskip("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=False,
        pad_token_id=None,
    )
    theirs = LlamaForCausalLM(config).to(dtype).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    layout = HuggingFaceLlamaFormat()
    opened = layout.open(tmp_path / "theirs")
    layout.write(tmp_path / "ours", opened)
    assert_equal(load_file(tmp_path / "ours" / "model.safetensors"), dict(theirs.state_dict()))
    again = LlamaForCausalLM.from_pretrained(tmp_path / "ours", dtype=dtype)
    assert_equal(dict(again.state_dict()), dict(theirs.state_dict()))
    prompt = [5, 60, 0, 7]
    with torch.no_grad():
        logits = theirs.float()(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(load_model(tmp_path / "theirs").logits(prompt), logits, rtol=0, atol=LOGITS)
