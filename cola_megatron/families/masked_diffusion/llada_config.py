"""config.json of a published LLaDA <-> our section."""

from collections.abc import Mapping
from typing import Any

import torch

from cola_megatron.config.masked_diffusion import MaskedDiffusionModelConfig
from cola_megatron.interop.errors import PublishedError

# published key -> that of our transformer
_SIZES = {
    "d_model": "hidden_size",
    "n_layers": "num_layers",
    "n_heads": "num_attention_heads",
    "mlp_hidden_size": "ffn_hidden_size",
    "rope_theta": "rotary_base",
    "rms_norm_eps": "norm_eps",
}
# What a key may say where it is there at all: one value in every model that we can hold.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llada",),
    "activation_type": ("silu",),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "bias_for_layer_norm": (False, None),
    "block_group_size": (1,),
    "block_type": ("llama",),
    "clip_qkv": (None,),
    "include_bias": (False,),
    "include_qkv_bias": (False, None),
    "input_emb_norm": (False,),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "multi_query_attention": (False, None),
    "rope": (True,),
    "scale_logits": (False,),
    "weight_tying": (False,),
}


def model_config_from_llada(written: Mapping[str, Any]) -> MaskedDiffusionModelConfig:
    """config.json as our section.

    The rows of embedding and head (`embedding_size`, or else `vocab_size`) are our vocabulary, with [MASK] in it as
    `mask_token_id`. Where that is a row of its own behind `vocab_size`, as in what we write, it is ours: null.

    Raises:
        PublishedError: it asks for what we do not have, or lacks what we need. ValueError: its numbers do not fit.
    """
    for key, allowed in _FIXED.items():
        if key in written and written[key] not in allowed:
            raise PublishedError(f"{key}={written[key]!r} cannot be held; it must be {allowed[0]!r}")
    needed = ("model_type", *_SIZES, "vocab_size", "mask_token_id")
    missing = [key for key in needed if written.get(key) is None]
    if missing:
        raise PublishedError(f"{', '.join(missing)} is missing")
    rows, vocab_size, mask = written.get("embedding_size") or written["vocab_size"], written["vocab_size"], None
    if not (written["mask_token_id"] == vocab_size == rows - 1):
        vocab_size, mask = rows, written["mask_token_id"]
    transformer = {ours: written[theirs] for theirs, ours in _SIZES.items()}
    key_value_heads = written.get("n_kv_heads")
    if key_value_heads not in (None, written["n_heads"]):
        transformer["num_key_value_heads"] = key_value_heads
    if written.get("init_std"):
        transformer["init_std"] = written["init_std"]
    return MaskedDiffusionModelConfig.model_validate(
        {"vocab_size": vocab_size, "mask_token_id": mask, "transformer": transformer}
    )


def model_config_to_llada(
    config: MaskedDiffusionModelConfig, dtype: torch.dtype, max_positions: int, end_of_text_id: int | None
) -> dict[str, Any]:
    """Our section as config.json.

    Raises:
        PublishedError: a model of blocks, which LLaDA is not.
    """
    if config.block_size is not None:
        raise PublishedError(
            f"model.block_size={config.block_size}: LLaDA denoises whole sequences, and has no layout for a model that "
            "sees the clean blocks before its own"
        )
    transformer = config.transformer
    published = {theirs: getattr(transformer, ours) for theirs, ours in _SIZES.items()}
    return dict(
        sorted(
            {
                **{key: allowed[0] for key, allowed in _FIXED.items() if key != "clip_qkv"},
                **published,
                "architectures": ["LLaDAModelLM"],
                "attention_dropout": 0.0,
                "embedding_dropout": 0.0,
                "embedding_size": config.vocab_size + config.extra_rows,
                "eos_token_id": end_of_text_id,
                "flash_attention": False,
                "init_std": transformer.init_std,
                "mask_token_id": config.mask_id,
                "max_sequence_length": max_positions,
                "mlp_ratio": 4,  # not read where there is mlp_hidden_size
                "n_kv_heads": transformer.key_value_heads,
                "pad_token_id": end_of_text_id,
                "residual_dropout": 0.0,
                "rope_full_precision": True,
                "torch_dtype": str(dtype).removeprefix("torch."),
                "use_cache": False,
                "vocab_size": config.vocab_size,
            }.items()
        )
    )
