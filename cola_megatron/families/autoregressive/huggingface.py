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
from cola_megatron.data import read_tokenizer
from cola_megatron.families.autoregressive.huggingface_config import model_config_from_llama, model_config_to_llama
from cola_megatron.inference.text_model import END_OF_TEXT_TOKENS
from cola_megatron.interop.errors import PublishedError
from cola_megatron.interop.stored_model import CheckpointModel
from cola_megatron.interop.weight_files import MAX_SHARD_BYTES, WeightFiles, write_weights
from cola_megatron.interop.weight_source import ModelSource, WeightFormat
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


class HuggingFaceLlama:
    """Such a folder, opened: all but the values is checked. It is a `ModelSource`.

    Raises:
        PublishedError: a missing or broken file; unknown, missing or misshapen tensors; an architecture we do not have.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._written = _read_config(folder / CONFIG)
        self.tied = bool(self._written.get("tie_word_embeddings", False))
        try:
            self.config = model_config_from_llama(self._written)
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
    def imported(self) -> dict[str, Any]:
        """config.json and the type of every tensor, so that a checkpoint that was imported is written as it was."""
        dtypes = {name: str(stored.dtype).removeprefix("torch.") for name, stored in self._files.tensors.items()}
        return {"config": self._written, "dtypes": dtypes}

    def read(self, name: str) -> torch.Tensor:
        """One tensor by our name, in our layout: float32, which holds every published type exactly."""
        rule = self._rules[name]
        return rule.to_ours(*(self._stored(each).float() for each in rule.published)).contiguous()

    def _stored(self, name: str) -> torch.Tensor:
        return self._files.read(EMBEDDING if self.tied and name == HEAD else name)

    def _check_tensors(self) -> None:
        wanted = {name: shape for rule in self._rules.values() for name, shape in rule.published.items()}
        if self.tied:
            del wanted[HEAD]
        # Old folders hold the rotary frequencies, which follow from config.json; tied ones may hold the head twice.
        found = {
            name: stored.shape
            for name, stored in self._files.tensors.items()
            if not name.endswith(".rotary_emb.inv_freq") and not (self.tied and name == HEAD)
        }
        _refuse_differences(str(self._files.source), wanted, found)


class HuggingFaceLlamaFormat(WeightFormat):
    """The folder as a format of the family."""

    name = "the Hugging Face layout of LLaMA"

    def matches(self, folder: Path) -> bool:
        """Whether its config.json says so."""
        path = folder / CONFIG
        return path.is_file() and _read_config(path).get("model_type") == "llama"

    def open(self, folder: Path) -> HuggingFaceLlama:
        """See `HuggingFaceLlama`."""
        return HuggingFaceLlama(folder)

    def write(
        self,
        folder: Path,
        source: ModelSource,
        dtype: torch.dtype | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        progress: bool = False,
    ) -> None:
        """Writes the folder with one tensor of ours in memory at a time.

        What was imported is written as it was read, type by type and key by key of config.json, unless a type is given;
        of tied embeddings both matrices. The longest text that config.json admits is that of training.

        Raises:
            PublishedError: the tensors are not exactly those of the model, or one is not finite. Weights that were in
                the folder stay.
        """
        assert isinstance(source.config, AutoregressiveModelConfig)
        rules = llama_rules(source.config.vocab_size, source.config.transformer)
        _refuse_differences(
            "the model to be written", {name: rule.shape for name, rule in rules.items()}, source.shapes
        )
        imported: Mapping[str, Any] = source.imported or {"config": None, "dtypes": {}}
        shapes = {name: shape for rule in rules.values() for name, shape in rule.published.items()}

        def type_of(name: str) -> torch.dtype:
            stored = imported["dtypes"].get(name, imported["dtypes"].get(EMBEDDING, "float32"))
            return dtype or getattr(torch, stored)

        planned = [PlannedTensor(name, type_of(name), shape) for name, shape in shapes.items()]
        config = imported["config"] or model_config_to_llama(
            source.config, dtype or torch.float32, _trained_length(source), _end_of_text_id(source.tokenizer)
        )
        folder.mkdir(parents=True, exist_ok=True)
        with tqdm(total=len(planned), disable=not progress, unit="tensor", desc="write") as bar:
            write_weights(folder, planned, _reader(source, rules, type_of, bar), max_shard_bytes)
        _write_json(folder / CONFIG, _as_written(config, dtype))
        if source.tokenizer is not None:
            if source.tokenizer.resolve() != (folder / TOKENIZER).resolve():
                shutil.copyfile(source.tokenizer, folder / TOKENIZER)
            _write_json(folder / TOKENIZER_CONFIG, {"tokenizer_class": "PreTrainedTokenizerFast"})


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


def _as_written(config: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """config.json with what is now so: two matrices of the vocabulary, and the type where one was asked for."""
    changed: dict[str, Any] = {"tie_word_embeddings": False} if config.get("tie_word_embeddings") else {}
    if dtype is not None:
        keys = {"dtype", "torch_dtype"} & config.keys() or {"dtype"}
        changed |= dict.fromkeys(sorted(keys), str(dtype).removeprefix("torch."))
    return {**config, **changed}


def _trained_length(source: ModelSource) -> int:
    return source.run.data.sequence_length if isinstance(source, CheckpointModel) else DEFAULT_POSITIONS


def _end_of_text_id(tokenizer: Path | None) -> int | None:
    """Of the tokens that end a text in the tokenizers that we know, the first that this one has."""
    if tokenizer is None:
        return None
    vocabulary = read_tokenizer(tokenizer)
    found = (vocabulary.token_to_id(token) for token in END_OF_TEXT_TOKENS)
    return next((token for token in found if token is not None), None)


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
