"""The Hugging Face LLaMA folder: config.json, safetensors (one file or shards with an index), tokenizer.json.

Tensors are only renamed and laid out otherwise, so every bit survives both ways. Of the architecture this holds exactly
what `TransformerConfig` does; anything else that a config.json may ask for is refused in one line. A folder with
`tie_word_embeddings` is read with a copy of the embedding as its head: the two matrices compute the same and go their
own ways in training, and what is written has both.

Shapes: H hidden, F inside the feed-forward, G heads of keys and values, each shared by Q query heads, D head channels.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cola_megatron.checkpoint.tensor_files import PlannedTensor
from cola_megatron.config.autoregressive import AutoregressiveModelConfig
from cola_megatron.config.transformer import TransformerConfig
from cola_megatron.families.autoregressive.huggingface_config import model_config_from_llama, model_config_to_llama
from cola_megatron.interop.errors import PublishedError
from cola_megatron.interop.weight_files import MAX_SHARD_BYTES, WeightFiles, write_weights
from cola_megatron.layers.mlp import swiglu_groups

CONFIG, TOKENIZER, TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """One tensor of ours: those of the folder that it is made of, and the two inverse ways between them."""

    published: dict[str, Shape]
    """Names and shapes in the folder."""
    to_ours: Callable[..., torch.Tensor] = lambda tensor: tensor
    """Those tensors, in that order -> ours."""
    to_published: Callable[[torch.Tensor], tuple[torch.Tensor, ...]] = lambda tensor: (tensor,)

    @property
    def shape(self) -> Shape:
        """Of our whole tensor."""
        return tuple(self.to_ours(*(torch.empty(shape, device="meta") for shape in self.published.values())).shape)


def llama_rules(vocab_size: int, config: TransformerConfig) -> dict[str, Rule]:
    """Every parameter of `Transformer`, by our name under `transformer.`."""
    hidden, inner, channels = config.hidden_size, config.ffn_hidden_size, config.head_dim
    width, shared_width = config.num_attention_heads * channels, config.key_value_heads * channels
    rules = {
        "embedding.weight": Rule({"model.embed_tokens.weight": (vocab_size, hidden)}),
        "norm.weight": Rule({"model.norm.weight": (hidden,)}),
        "head.linear.weight": Rule({"lm_head.weight": (vocab_size, hidden)}),
    }
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        attention, ffn = f"{theirs}.self_attn", f"{theirs}.mlp"
        rules |= {
            f"{ours}.attention_norm.weight": Rule({f"{theirs}.input_layernorm.weight": (hidden,)}),
            f"{ours}.attention.qkv.weight": Rule(
                {
                    f"{attention}.q_proj.weight": (width, hidden),
                    f"{attention}.k_proj.weight": (shared_width, hidden),
                    f"{attention}.v_proj.weight": (shared_width, hidden),
                },
                *_interleaved(config.key_value_heads, (config.num_attention_heads // config.key_value_heads, 1, 1)),
            ),
            f"{ours}.attention.output.weight": Rule({f"{attention}.o_proj.weight": (hidden, width)}),
            f"{ours}.ffn_norm.weight": Rule({f"{theirs}.post_attention_layernorm.weight": (hidden,)}),
            f"{ours}.ffn.input.weight": Rule(
                {f"{ffn}.up_proj.weight": (inner, hidden), f"{ffn}.gate_proj.weight": (inner, hidden)},
                *_interleaved(swiglu_groups(config.num_attention_heads, 2 * inner), (1, 1)),
            ),
            f"{ours}.ffn.output.weight": Rule({f"{ffn}.down_proj.weight": (hidden, inner)}),
        }
    return {f"transformer.{name}": rule for name, rule in rules.items()}


def _interleaved(
    groups: int, parts: tuple[int, ...]
) -> tuple[Callable[..., torch.Tensor], Callable[[torch.Tensor], tuple[torch.Tensor, ...]]]:
    """Fused projections: published rows are (groups, part, channels) of each, ours (groups, all parts, channels)."""

    def joined(*tensors: torch.Tensor) -> torch.Tensor:
        rows = [tensor.unflatten(0, (groups, part, -1)) for tensor, part in zip(tensors, parts, strict=True)]
        return torch.cat(rows, dim=1).flatten(0, 2)

    def apart(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pieces = tensor.unflatten(0, (groups, sum(parts), -1)).split(parts, dim=1)
        return tuple(piece.flatten(0, 2) for piece in pieces)

    return joined, apart


class HuggingFaceLlama:
    """Such a folder, opened: all but the values is checked.

    Raises:
        PublishedError: a missing or broken file; unknown, missing or misshapen tensors; an architecture we do not have.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        written = _read_config(folder / CONFIG)
        self.tied = bool(written.get("tie_word_embeddings", False))
        try:
            self.config = model_config_from_llama(written)
        except PublishedError as error:
            raise PublishedError(f"{folder / CONFIG}: {error}") from None
        except ValueError as error:
            raise PublishedError(f"{folder / CONFIG}: {' '.join(str(error).split())}") from None
        self._rules = llama_rules(self.config.vocab_size, self.config.transformer)
        self._files = WeightFiles(folder)
        self._check_tensors()
        self.tokenizer = folder / TOKENIZER if (folder / TOKENIZER).is_file() else None

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of every tensor, by our names."""
        return {name: rule.shape for name, rule in self._rules.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The type that its matrices are stored in: written in it, the weights are what was read."""
        return self._files.tensors["model.embed_tokens.weight"].dtype

    def read(self, name: str) -> torch.Tensor:
        """One tensor by our name, in our layout: float32, which holds every published type exactly."""
        rule = self._rules[name]
        return rule.to_ours(*(self._stored(each).float() for each in rule.published)).contiguous()

    def _stored(self, name: str) -> torch.Tensor:
        return self._files.read("model.embed_tokens.weight" if self.tied and name == "lm_head.weight" else name)

    def _check_tensors(self) -> None:
        wanted = {name: shape for rule in self._rules.values() for name, shape in rule.published.items()}
        if self.tied:
            del wanted["lm_head.weight"]
        # Old folders hold the rotary frequencies, which follow from config.json; tied ones may hold the head twice.
        found = {
            name: stored.shape
            for name, stored in self._files.tensors.items()
            if not name.endswith(".rotary_emb.inv_freq") and not (self.tied and name == "lm_head.weight")
        }
        _refuse_differences(str(self._files.source), wanted, found)


def is_huggingface_llama(folder: Path) -> bool:
    """Whether a folder means to be one."""
    path = folder / CONFIG
    return path.is_file() and _read_config(path).get("model_type") == "llama"


def write_huggingface_llama(
    folder: Path,
    config: AutoregressiveModelConfig,
    shapes: Mapping[str, Shape],
    read: Callable[[str], torch.Tensor],
    tokenizer: Path | None,
    dtype: torch.dtype = torch.float32,
    max_positions: int = 2048,
    end_of_text_id: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = False,
) -> None:
    """Writes the folder with one tensor of ours in memory at a time.

    Args:
        shapes: of every tensor, by our names.
        read: one tensor by our name, float32 on the CPU.
        max_positions: the length that the model was trained for; other programs may refuse more.
        end_of_text_id: where other programs end a text.

    Raises:
        PublishedError: the tensors are not exactly those of `config`, or one is not finite. Nothing was written, or
            weights that were there stay.
    """
    rules = llama_rules(config.vocab_size, config.transformer)
    _refuse_differences("the model to be written", {name: rule.shape for name, rule in rules.items()}, shapes)
    ours = {each: name for name, rule in rules.items() for each in rule.published}
    pieces: dict[str, torch.Tensor] = {}  # that are read and not yet written

    def published(name: str) -> torch.Tensor:
        if name not in pieces:
            rule, tensor = rules[ours[name]], read(ours[name])
            if not tensor.isfinite().all():
                raise PublishedError(f"{ours[name]} is not finite: the model has diverged; export one before that")
            pieces.update(zip(rule.published, rule.to_published(tensor), strict=True))
        bar.update()
        return pieces.pop(name).to(dtype)

    folder.mkdir(parents=True, exist_ok=True)
    planned = [PlannedTensor(name, dtype, shape) for rule in rules.values() for name, shape in rule.published.items()]
    with tqdm(total=len(planned), disable=not progress, unit="tensor", desc="write") as bar:
        write_weights(folder, planned, published, max_shard_bytes)
    _write_json(folder / CONFIG, model_config_to_llama(config, dtype, max_positions, end_of_text_id))
    if tokenizer is not None:
        if tokenizer.resolve() != (folder / TOKENIZER).resolve():
            shutil.copyfile(tokenizer, folder / TOKENIZER)
        _write_json(folder / TOKENIZER_CONFIG, {"tokenizer_class": "PreTrainedTokenizerFast"})


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise PublishedError(f"{path}: no such file; a Hugging Face model has one beside its weights") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PublishedError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise PublishedError(f"{path}: must be a JSON object, not {type(config).__name__}")
    return config


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _refuse_differences(source: str, wanted: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unknown:
        raise PublishedError(f"{source}: missing tensors {missing or 'none'}, unknown tensors {unknown or 'none'}")
    for name, shape in wanted.items():
        if tuple(found[name]) != shape:
            raise PublishedError(f"{source}: {name} has shape {tuple(found[name])}, its config asks for {shape}")
