"""The published inference layout: `cola_vae/`, `cola_dit/` (config.json, model.safetensors) and `tokenizer.json`."""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cola_megatron.config import ConfigError, ModelConfig, VAEConfig
from cola_megatron.errors import UserError
from cola_megatron.interop.published_configs import (
    dit_config_from_published,
    dit_config_to_published,
    vae_config_from_published,
    vae_config_to_published,
)
from cola_megatron.interop.published_names import Rule, dit_rules, vae_rules
from cola_megatron.interop.tensor_files import write_tensors

VAE_FOLDER, DIT_FOLDER, TOKENIZER = "cola_vae", "cola_dit", "tokenizer.json"
CONFIG, WEIGHTS = "config.json", "model.safetensors"


class PublishedError(UserError, ValueError):
    """A folder that is not a complete model in the published layout, or that we cannot represent; one line."""


def read_published(folder: Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """Reads both networks.

    Returns:
        the architecture, and whole float32 tensors named `vae.*` and `dit.*`.

    Raises:
        PublishedError: a missing or broken file, an unknown or missing tensor, an option we do not have.
    """
    vae_config, vocab_size, vae_state = read_published_vae(folder / VAE_FOLDER)
    published = _read_config(folder / DIT_FOLDER)
    try:
        dit_config = dit_config_from_published(published)
        model = ModelConfig(vocab_size=vocab_size, vae=vae_config, dit=dit_config)
    except ValueError as error:
        raise PublishedError(f"{folder / DIT_FOLDER / CONFIG}: {' '.join(str(error).split())}") from None
    dit_state = _read_weights(folder / DIT_FOLDER, dit_rules(dit_config))
    return model, {
        **{f"vae.{name}": tensor for name, tensor in vae_state.items()},
        **{f"dit.{name}": tensor for name, tensor in dit_state.items()},
    }


def read_published_vae(folder: Path) -> tuple[VAEConfig, int, dict[str, torch.Tensor]]:
    """Config, vocabulary size and tensors (named as in `TextVAE`) of a `cola_vae` folder; raises PublishedError."""
    published = _read_config(folder)
    try:
        config, vocab_size = vae_config_from_published(published)
    except ValueError as error:
        raise PublishedError(f"{folder / CONFIG}: {' '.join(str(error).split())}") from None
    return config, vocab_size, _read_weights(folder, vae_rules(config))


def write_published(
    folder: Path,
    model: ModelConfig,
    state: dict[str, torch.Tensor],
    tokenizer: Path | None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes whole tensors named `vae.*` and (where there is a prior) `dit.*`; other names are refused.

    Raises:
        PublishedError: the tensors are not exactly those of `model`, or an option has no published form.
    """
    parts = {"vae": {}, "dit": {}}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part not in parts:
            raise PublishedError(f"{name}: neither of the VAE nor of the DiT")
        parts[part][rest] = tensor
    try:
        vae_config = vae_config_to_published(model.vae, model.vocab_size, dtype)
        dit_config = dit_config_to_published(model.dit, dtype) if parts["dit"] else None
    except ConfigError as error:
        raise PublishedError(str(error)) from None
    _write(folder / VAE_FOLDER, vae_config, parts["vae"], vae_rules(model.vae), dtype)
    if dit_config is not None:
        _write(folder / DIT_FOLDER, dit_config, parts["dit"], dit_rules(model.dit), dtype)
    if tokenizer is not None and tokenizer.resolve() != (folder / TOKENIZER).resolve():
        shutil.copyfile(tokenizer, folder / TOKENIZER)


def _read_config(folder: Path) -> dict:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise PublishedError(f"{path}: no such file; a published model has {VAE_FOLDER}/ and {DIT_FOLDER}/") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PublishedError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise PublishedError(f"{path}: must be a JSON object, not {type(config).__name__}")
    return config


def _read_weights(folder: Path, rules: dict[str, Rule]) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise PublishedError(f"{path}: no such file") from None
    except SafetensorError as error:
        raise PublishedError(f"{path}: not a readable safetensors file: {error}") from None
    wanted = {rule.published for rule in rules.values()}
    missing = sorted(wanted - tensors.keys())
    # The rotary frequencies are a buffer of the published package, a function of the config.
    unknown = sorted(name for name in tensors.keys() - wanted if not name.endswith(".rope.rope.freqs"))
    if missing or unknown:
        raise PublishedError(f"{path}: missing tensors {missing or 'none'}, unknown tensors {unknown or 'none'}")
    state = {}
    for name, rule in rules.items():
        tensor = tensors[rule.published]
        try:
            state[name] = rule.to_ours(tensor.float()).contiguous()
        except RuntimeError as error:
            raise PublishedError(f"{path}: {rule.published} has shape {tuple(tensor.shape)}: {error}") from None
    return state


def _write(
    folder: Path, config: dict, state: dict[str, torch.Tensor], rules: dict[str, Rule], dtype: torch.dtype
) -> None:
    missing, unknown = sorted(rules.keys() - state.keys()), sorted(state.keys() - rules.keys())
    if missing or unknown:
        raise PublishedError(f"{folder}: missing tensors {missing or 'none'}, unknown tensors {unknown or 'none'}")
    tensors = {rule.published: rule.to_published(state[name]).to(dtype).contiguous() for name, rule in rules.items()}
    if "rope_dim" in config:
        frequencies = 1.0 / 10_000.0 ** (torch.arange(0, config["rope_dim"], 2).float() / config["rope_dim"])
        for layer in range(config["num_layers"]):
            tensors[f"blocks.{layer}.msa.rope.rope.freqs"] = frequencies.clone()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_tensors(folder / WEIGHTS, tensors)
