"""config.json of a Hugging Face LLaMA <-> our sections."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from cola_megatron.config.autoregressive import AutoregressiveModelConfig
from cola_megatron.config.transformer import TransformerConfig
from cola_megatron.interop.errors import PublishedError


def model_config_from_llama(written: Mapping[str, Any]) -> AutoregressiveModelConfig:
    """config.json as our sections.

    Raises:
        PublishedError: it asks for what we do not have. ValueError: its numbers do not fit together.
    """
    if written.get("model_type") != "llama":
        raise PublishedError(f"model_type={written.get('model_type')!r}: only 'llama' can be read")
    for key, allowed in _ONLY.items():
        if key in written and written[key] not in allowed:
            raise PublishedError(f"{key}={written[key]!r} cannot be held; it must be {_or(allowed)}")
    base, kind = _rotary(written)
    if kind != "default":
        raise PublishedError(f"rope_type={kind!r}: scaled rotary frequencies cannot be held")
    missing = [key for key in _SIZES.values() if key not in written]
    if missing:
        raise PublishedError(f"{missing[0]} is missing")
    transformer = {
        **{ours: written[theirs] for ours, theirs in _SIZES.items() if ours != "vocab_size"},
        "num_key_value_heads": written.get("num_key_value_heads"),
        "norm_eps": written.get("rms_norm_eps", 1e-6),
        "rotary_base": base,
    }
    if transformer["num_key_value_heads"] == transformer["num_attention_heads"]:
        transformer["num_key_value_heads"] = None
    if written.get("initializer_range"):
        transformer["init_std"] = written["initializer_range"]
    config = AutoregressiveModelConfig(
        vocab_size=written["vocab_size"], transformer=TransformerConfig.model_validate(transformer)
    )
    head_dim = written.get("head_dim")
    if head_dim not in (None, config.transformer.head_dim):
        raise PublishedError(
            f"head_dim={head_dim} cannot be held; it must be hidden_size / num_attention_heads = "
            f"{config.transformer.head_dim}"
        )
    return config


def model_config_to_llama(
    config: AutoregressiveModelConfig, dtype: torch.dtype, max_positions: int, end_of_text_id: int | None = None
) -> dict[str, Any]:
    """Our sections as config.json."""
    transformer, dtype_name = config.transformer, str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "dtype": dtype_name,
        # Left out, these would be 1 and 2, ordinary tokens here.
        "eos_token_id": end_of_text_id,
        "head_dim": transformer.head_dim,
        "hidden_act": "silu",
        "hidden_size": transformer.hidden_size,
        "initializer_range": transformer.init_std,
        "intermediate_size": transformer.ffn_hidden_size,
        "max_position_embeddings": max_positions,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": transformer.num_attention_heads,
        "num_hidden_layers": transformer.num_layers,
        "num_key_value_heads": transformer.key_value_heads,
        "rms_norm_eps": transformer.norm_eps,
        # transformers 4 reads the first, 5 the second.
        "rope_theta": transformer.rotary_base,
        "rope_parameters": {"rope_theta": transformer.rotary_base, "rope_type": "default"},
        "tie_word_embeddings": False,
        "torch_dtype": dtype_name,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


_SIZES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
}
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}
"""What a key may say, where it is there at all."""


def _rotary(written: Mapping[str, Any]) -> tuple[float, str]:
    """Base and kind of the rotary frequencies, as transformers 4 or 5 writes them."""
    scaling, parameters = written.get("rope_scaling") or {}, written.get("rope_parameters") or {}
    for key, given in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if not isinstance(given, dict):
            raise PublishedError(f"{key}={given!r} must be an object")
    kind = parameters.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default"
    return parameters.get("rope_theta", written.get("rope_theta", 10_000.0)), kind


def _or(allowed: Iterable[Any]) -> str:
    return " or ".join(repr(value) for value in allowed if value is not None) or "absent"
