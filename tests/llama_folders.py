"""Small LLaMA folders whose weights follow from a formula, and what transformers computed from them.

`python -m tests.llama_folders` writes tests/data/llama_golden.json anew; it needs transformers, which made the numbers
that are there (5.24.0).
"""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).parent / "data" / "llama_golden.json"
PROMPT, NEW_TOKENS = [3, 17, 0, 29, 8, 8], 8
SIZES = {"vocab_size": 32, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6}
CASES: dict[str, dict[str, Any]] = {
    "one head of keys for each of queries": {**SIZES, "num_key_value_heads": 6, "rms_norm_eps": 1e-5},
    "grouped queries": {**SIZES, "num_key_value_heads": 2, "rms_norm_eps": 1e-3, "rope_theta": 500_000.0},
}


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the folder."""
    hidden, inner, heads = (config[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads"))
    shared = hidden // heads * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config["vocab_size"], hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (shared, hidden),
            "self_attn.v_proj": (shared, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    return shapes


def values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor that follows from its name: whole numbers modulo 2^32, spread over -1 .. 1, and norms around 1."""
    index, start = np.arange(math.prod(shape), dtype=np.uint64), np.uint64(zlib.crc32(name.encode()))
    mixed = (index * np.uint64(2_654_435_761) + start) % 2**32
    mixed = (mixed * mixed + index * np.uint64(40_503)) >> np.uint64(16)
    spread = torch.from_numpy((mixed % 2**24).astype(np.float64) / 2**23 - 1).float().view(shape)
    return 1 + 0.3 * spread if len(shape) == 1 else 0.5 * spread


def write_folder(folder: Path, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """As transformers would write it; returns its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: values(name, shape).to(dtype) for name, shape in shapes_of(config).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_act": "silu", **config}))
    return tensors


def computed_by_transformers(folder: Path) -> dict[str, Any]:
    """Logits of the prompt and the tokens that follow it greedily."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = torch.tensor([PROMPT])
    with torch.no_grad():
        logits = model(prompt).logits[0]
        ids, found = prompt, []
        for _ in range(NEW_TOKENS):
            found.append(model(ids).logits[0, -1].argmax().item())
            ids = torch.cat((ids, torch.tensor([[found[-1]]])), dim=1)
    return {"logits": [[float(f"{value:.7g}") for value in row] for row in logits.tolist()], "greedy": found}


def main() -> None:
    """Writes the golden numbers."""
    import tempfile

    golden = {}
    for name, config in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), config)
            golden[name] = computed_by_transformers(Path(folder))
    rows = json.dumps(golden, indent=1).replace(",\n    ", ", ").replace("[\n    ", "[").replace("\n   ]", "]")
    GOLDEN.write_text(rows + "\n")


if __name__ == "__main__":
    main()
