"""Weights of the shared transformer in folders of other programs: config.json, safetensors, tokenizer.json.

Tensors are only renamed and laid out otherwise, so every bit survives both ways. The rules are those of LLaMA's names;
a program that has other ones for the same tensors renames them.

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
from cola_megatron.config.transformer import TransformerConfig
from cola_megatron.data import read_tokenizer
from cola_megatron.inference.text_model import END_OF_TEXT_TOKENS
from cola_megatron.interop.errors import PublishedError
from cola_megatron.interop.stored_model import CheckpointModel
from cola_megatron.interop.weight_files import WeightFiles, write_weights
from cola_megatron.interop.weight_source import ModelSource
from cola_megatron.layers.mlp import swiglu_groups

CONFIG, TOKENIZER, TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DEFAULT_POSITIONS = 2048
"""Longest text of a model whose training is not known."""
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


class RenamedFolder:
    """An opened folder of another program whose tensors are ours under other names; the base of a `ModelSource`."""

    _rules: Mapping[str, Rule]
    _files: WeightFiles
    _written: Mapping[str, Any]
    """config.json."""

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of every tensor, by our names."""
        return {name: rule.shape for name, rule in self._rules.items()}

    @property
    def imported(self) -> dict[str, Any]:
        """config.json and the type of every tensor, so that a checkpoint that was imported is written as it was."""
        dtypes = {name: str(stored.dtype).removeprefix("torch.") for name, stored in self._files.tensors.items()}
        return {"config": self._written, "dtypes": dtypes}

    def read(self, name: str) -> torch.Tensor:
        """One tensor by our name, in our layout: float32, which holds every published type exactly."""
        rule = self._rules[name]
        return rule.to_ours(*(self.stored(each).float() for each in rule.published)).contiguous()

    def stored(self, name: str) -> torch.Tensor:
        """A published tensor, of the type it is stored in."""
        return self._files.read(name)


def llama_rules(vocab_size: int, config: TransformerConfig) -> dict[str, Rule]:
    """Every parameter of `Transformer`, by our name under `transformer.`."""
    hidden, inner, channels = config.hidden_size, config.ffn_hidden_size, config.head_dim
    width, shared_width = config.num_attention_heads * channels, config.key_value_heads * channels
    rules = {
        "embedding.weight": Rule({EMBEDDING: (vocab_size, hidden)}),
        "norm.weight": Rule({"model.norm.weight": (hidden,)}),
        "head.linear.weight": Rule({HEAD: (vocab_size, hidden)}),
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


def write_tensors(
    folder: Path,
    source: ModelSource,
    rules: Mapping[str, Rule],
    type_of: Callable[[str], torch.dtype],
    max_shard_bytes: int,
    progress: bool,
) -> None:
    """Writes the weights with one tensor of ours in memory at a time, and the tokenizer where there is one.

    Args:
        type_of: of each published tensor.

    Raises:
        PublishedError: the tensors are not exactly those of the rules, or one is not finite. Weights that were in the
            folder stay.
    """
    refuse_differences("the model to be written", {name: rule.shape for name, rule in rules.items()}, source.shapes)
    shapes = {name: shape for rule in rules.values() for name, shape in rule.published.items()}
    planned = [PlannedTensor(name, type_of(name), shape) for name, shape in shapes.items()]
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(planned), disable=not progress, unit="tensor", desc="write") as bar:
        write_weights(folder, planned, _reader(source, rules, type_of, bar), max_shard_bytes)
    if source.tokenizer is not None:
        if source.tokenizer.resolve() != (folder / TOKENIZER).resolve():
            shutil.copyfile(source.tokenizer, folder / TOKENIZER)
        write_json(folder / TOKENIZER_CONFIG, {"tokenizer_class": "PreTrainedTokenizerFast"})


def _reader(
    source: ModelSource, rules: Mapping[str, Rule], type_of: Callable[[str], torch.dtype], bar: "tqdm[Any]"
) -> Callable[[str], torch.Tensor]:
    """Published tensors by name; one of ours is read once for all that are made of it."""
    ours = {each: name for name, rule in rules.items() for each in rule.published}
    pieces: dict[str, torch.Tensor] = {}  # that were read and are not yet written

    def published(name: str) -> torch.Tensor:
        if name not in pieces:
            rule, tensor = rules[ours[name]], source.read(ours[name])
            if not tensor.isfinite().all():
                raise PublishedError(f"{ours[name]} is not finite: the model has diverged; export one before that")
            pieces.update(zip(rule.published, rule.to_published(tensor), strict=True))
        bar.update()
        return pieces.pop(name).to(type_of(name))

    return published


def trained_length(source: ModelSource) -> int:
    """Longest text that the model was trained on."""
    return source.run.data.sequence_length if isinstance(source, CheckpointModel) else DEFAULT_POSITIONS


def end_of_text_id(tokenizer: Path | None) -> int | None:
    """Of the tokens that end a text in the tokenizers that we know, the first that this one has."""
    if tokenizer is None:
        return None
    vocabulary = read_tokenizer(tokenizer)
    found = (vocabulary.token_to_id(token) for token in END_OF_TEXT_TOKENS)
    return next((token for token in found if token is not None), None)


def read_config(path: Path) -> dict[str, Any]:
    """A config.json; raises PublishedError where there is none."""
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise PublishedError(f"{path}: no such file; a Hugging Face model has one beside its weights") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PublishedError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise PublishedError(f"{path}: must be a JSON object, not {type(config).__name__}")
    return config


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """As such folders have it."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def refuse_differences(source: str, wanted: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Raises PublishedError where names or shapes are not those that are wanted; `source` has them."""
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unknown:
        raise PublishedError(f"{source}: missing tensors {missing or 'none'}, unknown tensors {unknown or 'none'}")
    for name, shape in wanted.items():
        if tuple(found[name]) != shape:
            raise PublishedError(f"{source}: {name} has shape {tuple(found[name])}, its config asks for {shape}")
