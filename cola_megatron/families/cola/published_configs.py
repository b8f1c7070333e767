"""config.json of the published package <-> our sections."""

from typing import Any

import torch

from cola_megatron.config import ConfigError, DiTConfig, VAEConfig

# Options of the published config that have one value in every model we can represent.
_VAE_FIXED = {
    "act": "swiglu",
    "attn_dropout": 0.0,
    "block_causal": True,
    "clip_qkv": None,
    "dropout": 0.0,
    "layer_norm_type": "layer_norm",
    "model_type": "cola_text_vae",
    "shared_heads_kv": 1,
}
_DIT_FIXED = {"model_type": "cola_dit", "patch_size": 1}
# Options that any value may have: the published package reads them for starting weights, for half precision, or never.
_VAE_WITHOUT_EFFECT = {"causal": False, "init_fn": "normal", "rope_full_precision": True, "use_emb": True}
# What the published package takes where config.json does not say.
_VAE_DEFAULTS = {
    "vocab_size": 100_278,
    "encoder_num_blocks": 4,
    "decoder_num_blocks": 4,
    "dim": 1536,
    "ffn_dim": 6144,
    "num_heads": 12,
    "latent_dim": 16,
    "patch_size": 1,
    "block_size": 4,
    "post_norm": True,
    "layer_norm_eps": 1e-6,
    "layer_norm_affine": True,
    "qk_norm": True,
    "qk_norm_affine": True,
    "qk_bias": False,
    "bias": True,
    "rope_theta": 500_000.0,
    "encoder_last_ln": True,
    "use_variation": True,
    "shifting_factor": 0.0,
    "scaling_factor": 1.0,
    "init_std": 0.02,
    "init_cutoff_factor": 3.0,
}
_DIT_DEFAULTS = {
    "num_layers": 24,
    "txt_dim": 2048,
    "emb_dim": 2048,
    "heads": 16,
    "head_dim": 128,
    "expand_ratio": 4,
    "txt_in_channels": 16,
    "txt_out_channels": 16,
    "block_size": 4,
    "norm_eps": 1e-5,
    "qk_bias": False,
    "rope_dim": 96,
}

# published key -> ours
_VAE_KEYS = {
    "encoder_num_blocks": "encoder_layers",
    "decoder_num_blocks": "decoder_layers",
    "dim": "hidden_size",
    "ffn_dim": "ffn_hidden_size",
    "num_heads": "num_attention_heads",
    "latent_dim": "latent_dim",
    "patch_size": "patch_size",
    "block_size": "block_size",
    "post_norm": "post_norm",
    "layer_norm_eps": "norm_eps",
    "layer_norm_affine": "norm_affine",
    "qk_norm": "query_key_norm",
    "qk_norm_affine": "query_key_norm_affine",
    "qk_bias": "qkv_bias",
    "bias": "bias",
    "rope_theta": "rotary_base",
    "encoder_last_ln": "mean_norm",
    "use_variation": "variational",
    "shifting_factor": "shifting_factor",
    "scaling_factor": "scaling_factor",
    "init_std": "init_std",
    "init_cutoff_factor": "init_cutoff_factor",
}
_DIT_KEYS = {
    "num_layers": "num_layers",
    "txt_dim": "hidden_size",
    "heads": "num_attention_heads",
    "head_dim": "head_dim",
    "expand_ratio": "ffn_expansion",
    "txt_in_channels": "latent_dim",
    "block_size": "block_size",
    "norm_eps": "norm_eps",
    "qk_bias": "qkv_bias",
    "rope_dim": "rotary_dim",
}
# Written by the libraries that save such files: they say nothing about the model.
REMARKS = {
    "architectures",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "return_dict",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def vae_config_from_published(published: dict[str, Any]) -> tuple[VAEConfig, int]:
    """Our VAE section and the vocabulary size; ValueError names an option we do not have."""
    _check(published, _VAE_FIXED, {*_VAE_DEFAULTS, *_VAE_WITHOUT_EFFECT})
    published = _VAE_DEFAULTS | published
    if published["init_cutoff_factor"] is None:  # starting weights that are not cut: there are none to be drawn
        published["init_cutoff_factor"] = _VAE_DEFAULTS["init_cutoff_factor"]
    vocab_size = published["vocab_size"]
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise ValueError(f"vocab_size={vocab_size!r} must be a positive integer")
    return VAEConfig(**{ours: published[key] for key, ours in _VAE_KEYS.items()}), vocab_size


def dit_config_from_published(published: dict[str, Any]) -> DiTConfig:
    """Our DiT section; ValueError names an option we do not have."""
    _check(published, _DIT_FIXED, {*_DIT_DEFAULTS})
    published = _DIT_DEFAULTS | published
    for key, same in (("emb_dim", "txt_dim"), ("txt_out_channels", "txt_in_channels")):
        if published[key] != published[same]:
            raise ValueError(f"{key}={published[key]} must equal {same}={published[same]}")
    return DiTConfig(**{ours: published[key] for key, ours in _DIT_KEYS.items()})


def vae_config_to_published(config: VAEConfig, vocab_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a `cola_vae` folder; raises ConfigError for what the published package cannot express."""
    if config.fixed_logsnr is not None:
        # The head's log-variance half is unused by us but read by the published sampler.
        raise ConfigError(
            f"model.vae.fixed_logsnr={config.fixed_logsnr}: the published layout has learned variances only"
        )
    return {
        **_VAE_FIXED,
        **_VAE_WITHOUT_EFFECT,
        **{key: getattr(config, ours) for key, ours in _VAE_KEYS.items()},
        "vocab_size": vocab_size,
        "architectures": ["ColaTextVAEModel"],
        "dtype": named_type(dtype),
    }


def dit_config_to_published(config: DiTConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a `cola_dit` folder; raises ConfigError for what the published package cannot express."""
    for key, fixed in (("rotary_base", 10_000.0), ("time_embedding_dim", 256)):
        if getattr(config, key) != fixed:
            raise ConfigError(f"model.dit.{key}={getattr(config, key)}: the published layout has {fixed} only")
    return {
        **_DIT_FIXED,
        **{key: getattr(config, ours) for key, ours in _DIT_KEYS.items()},
        "emb_dim": config.hidden_size,
        "txt_out_channels": config.latent_dim,
        "architectures": ["ColaDiTModel"],
        "dtype": named_type(dtype),
    }


def named_type(dtype: torch.dtype) -> str:
    """As config.json names a type: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def _check(published: dict[str, Any], fixed: dict[str, Any], known: set[str]) -> None:
    for key, value in fixed.items():
        if key in published and published[key] != value:
            raise ValueError(f"{key}={published[key]!r} is not supported; it must be {value!r}")
    unknown = sorted(published.keys() - known - fixed.keys() - REMARKS)
    unknown = [key for key in unknown if not key.startswith("_")]  # private to the library that wrote the file
    if unknown:
        raise ValueError(f"unknown keys {', '.join(unknown)}")
