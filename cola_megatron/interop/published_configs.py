"""config.json of the published package <-> our sections."""

from typing import Any

import torch

from cola_megatron.config import ConfigError, DiTConfig, VAEConfig

# Options of the published config that have one value in every model we can represent.
_VAE_FIXED = {
    "act": "swiglu",
    "attn_dropout": 0.0,
    "block_causal": True,
    "causal": False,
    "clip_qkv": None,
    "dropout": 0.0,
    "init_fn": "normal",
    "layer_norm_type": "layer_norm",
    "model_type": "cola_text_vae",
    "rope_full_precision": True,
    "shared_heads_kv": 1,
    "use_emb": True,
}
_DIT_FIXED = {"model_type": "cola_dit", "patch_size": 1}

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
# Written by the libraries that save such files; they say nothing about the model.
_IGNORED = {"architectures", "dtype", "torch_dtype", "transformers_version", "auto_map", "_name_or_path"}


def vae_config_from_published(published: dict[str, Any]) -> tuple[VAEConfig, int]:
    """Our VAE section and the vocabulary size; ValueError names an option we do not have."""
    _check(published, _VAE_FIXED, {*_VAE_KEYS, "vocab_size"})
    vocab_size = published.get("vocab_size")
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise ValueError(f"vocab_size={vocab_size!r} must be a positive integer")
    return VAEConfig(**_renamed(published, _VAE_KEYS)), vocab_size


def dit_config_from_published(published: dict[str, Any]) -> DiTConfig:
    """Our DiT section; ValueError names an option we do not have."""
    _check(published, _DIT_FIXED, {*_DIT_KEYS, "emb_dim", "txt_out_channels"})
    for key, same in (("emb_dim", "txt_dim"), ("txt_out_channels", "txt_in_channels")):
        if published.get(key) != published.get(same):
            raise ValueError(f"{key}={published.get(key)} must equal {same}={published.get(same)}")
    return DiTConfig(**_renamed(published, _DIT_KEYS))


def vae_config_to_published(config: VAEConfig, vocab_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a `cola_vae` folder; raises ConfigError for what the published package cannot express."""
    if config.fixed_logsnr is not None:
        # The head's log-variance half is unused by us but read by the published sampler.
        raise ConfigError(
            f"model.vae.fixed_logsnr={config.fixed_logsnr}: the published layout has learned variances only"
        )
    return {
        **_VAE_FIXED,
        **{key: getattr(config, ours) for key, ours in _VAE_KEYS.items()},
        "vocab_size": vocab_size,
        "architectures": ["ColaTextVAEModel"],
        "dtype": _name(dtype),
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
        "dtype": _name(dtype),
    }


def _check(published: dict[str, Any], fixed: dict[str, Any], known: set[str]) -> None:
    for key, value in fixed.items():
        if key in published and published[key] != value:
            raise ValueError(f"{key}={published[key]!r} is not supported; it must be {value!r}")
    unknown = sorted(published.keys() - known - fixed.keys() - _IGNORED)
    if unknown:
        raise ValueError(f"unknown keys {', '.join(unknown)}")


def _renamed(published: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    missing = sorted(keys.keys() - published.keys())
    if missing:
        raise ValueError(f"missing keys {', '.join(missing)}")
    return {ours: published[key] for key, ours in keys.items()}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
