"""The published LLaDA folder (GSAI-ML/LLaDA-8B-Base): config.json, safetensors, tokenizer.json.

Its block is LLaMA's under other names, so every bit survives both ways. In it [MASK] is a token of the vocabulary, with
a row in embedding and head; ours is by default a row of the embedding alone. Written, such a model gets a head row of
zeros for [MASK]: read again it is what it was, and LLaDA's own code sees a logit of 0 there, which it must not choose.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cola_megatron.config.masked_diffusion import MaskedDiffusionModelConfig
from cola_megatron.families.llama_weights import (
    CONFIG,
    EMBEDDING,
    HEAD,
    TOKENIZER,
    RenamedFolder,
    Rule,
    end_of_text_id,
    llama_rules,
    read_config,
    refuse_differences,
    trained_length,
    write_json,
    write_tensors,
)
from cola_megatron.families.masked_diffusion.llada_config import model_config_from_llada, model_config_to_llada
from cola_megatron.interop.errors import PublishedError
from cola_megatron.interop.weight_files import MAX_SHARD_BYTES, WeightFiles
from cola_megatron.interop.weight_source import ModelSource, WeightFormat

# LLaMA's names -> LLaDA's: of whole tensors, of what layers are called, and of what is in one.
_NAMES = {
    EMBEDDING: "model.transformer.wte.weight",
    "model.norm.weight": "model.transformer.ln_f.weight",
    HEAD: "model.transformer.ff_out.weight",
}
_LAYERS = ("model.layers.", "model.transformer.blocks.")
_IN_LAYERS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}


def llada_rules(config: MaskedDiffusionModelConfig) -> dict[str, Rule]:
    """Every parameter of our network, by our name."""
    rows = config.vocab_size + config.extra_rows
    rules = {
        ours: replace(rule, published={_llada_name(name): shape for name, shape in rule.published.items()})
        for ours, rule in llama_rules(rows, config.transformer).items()
    }
    if config.extra_rows:
        rules["transformer.head.linear.weight"] = Rule(
            {_NAMES[HEAD]: (rows, config.transformer.hidden_size)}, _without_mask, _with_mask
        )
    return rules


def _llada_name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    layer, _, inside = name.removeprefix(_LAYERS[0]).partition(".")
    return f"{_LAYERS[1]}{layer}.{_IN_LAYERS[inside.removesuffix('.weight')]}.weight"


def _without_mask(head_RH: torch.Tensor) -> torch.Tensor:
    return head_RH[:-1]


def _with_mask(head_VH: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (torch.cat((head_VH, head_VH.new_zeros(1, head_VH.shape[1]))),)


class LLaDAFolder(RenamedFolder):
    """Such a folder, opened: all but the values is checked. It is a `ModelSource`.

    Raises:
        PublishedError: a missing or broken file; unknown, missing or misshapen tensors; an architecture we do not have;
            a head row of a [MASK] beyond the vocabulary that is not zero.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._written = read_config(folder / CONFIG)
        try:
            self.config = model_config_from_llada(self._written)
        except PublishedError as error:
            raise PublishedError(f"{folder / CONFIG}: {error}") from None
        except ValueError as error:
            raise PublishedError(f"{folder / CONFIG}: {' '.join(str(error).split())}") from None
        self._rules, self._files = llada_rules(self.config), WeightFiles(folder)
        wanted = {name: shape for rule in self._rules.values() for name, shape in rule.published.items()}
        found = {name: stored.shape for name, stored in self._files.tensors.items()}
        refuse_differences(str(self._files.source), wanted, found)
        if self.config.extra_rows and self._files.read(_NAMES[HEAD])[-1].any():
            raise PublishedError(
                f"{self._files.source}: {_NAMES[HEAD]} has a row for [MASK], which is beyond vocab_size; ours has none"
            )
        self.tokenizer = folder / TOKENIZER if (folder / TOKENIZER).is_file() else None


class LLaDAFormat(WeightFormat):
    """The folder as a format of the family."""

    name = "the layout of LLaDA"

    def matches(self, folder: Path) -> bool:
        """Whether its config.json says so."""
        path = folder / CONFIG
        return path.is_file() and read_config(path).get("model_type") == "llada"

    def open(self, folder: Path) -> LLaDAFolder:
        """See `LLaDAFolder`."""
        return LLaDAFolder(folder)

    def write(
        self,
        folder: Path,
        source: ModelSource,
        dtype: torch.dtype | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        progress: bool = False,
    ) -> None:
        """Writes the folder with one tensor of ours in memory at a time.

        What was imported is written as it was read, type by type and key by key of config.json, unless a type is given.

        Raises:
            PublishedError: a model of blocks; the tensors are not exactly those of the model, or one is not finite.
                Weights that were in the folder stay.
        """
        assert isinstance(source.config, MaskedDiffusionModelConfig)
        imported: Mapping[str, Any] = source.imported or {"config": None, "dtypes": {}}
        # Made even where it is not written: it refuses what the layout does not hold.
        config = model_config_to_llada(
            source.config, dtype or torch.float32, trained_length(source), end_of_text_id(source.tokenizer)
        )
        config = imported["config"] or config
        if dtype is not None:
            config = {**config, "torch_dtype": str(dtype).removeprefix("torch.")}

        def type_of(name: str) -> torch.dtype:
            return dtype or getattr(torch, imported["dtypes"].get(name, "float32"))

        write_tensors(folder, source, llada_rules(source.config), type_of, max_shard_bytes, progress)
        write_json(folder / CONFIG, config)
