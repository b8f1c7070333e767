"""The Hugging Face LLaMA folder: config.json, safetensors (one file or shards with an index), tokenizer.json.

Tensors are only renamed and laid out otherwise, so every bit survives both ways. Of the architecture this holds exactly
what `TransformerConfig` does; anything else that a config.json may ask for is refused in one line. A folder with
`tie_word_embeddings` is read with a copy of the embedding as its head: the two matrices compute the same and go their
own ways in training, and what is written has both.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cola_megatron.config.autoregressive import AutoregressiveModelConfig
from cola_megatron.families.autoregressive.huggingface_config import model_config_from_llama, model_config_to_llama
from cola_megatron.families.llama_weights import (
    CONFIG,
    EMBEDDING,
    HEAD,
    TOKENIZER,
    RenamedFolder,
    end_of_text_id,
    llama_rules,
    read_config,
    refuse_differences,
    trained_length,
    write_json,
    write_tensors,
)
from cola_megatron.interop.errors import PublishedError
from cola_megatron.interop.weight_files import MAX_SHARD_BYTES, WeightFiles
from cola_megatron.interop.weight_source import ModelSource, WeightFormat


class HuggingFaceLlama(RenamedFolder):
    """Such a folder, opened: all but the values is checked. It is a `ModelSource`.

    Raises:
        PublishedError: a missing or broken file; unknown, missing or misshapen tensors; an architecture we do not have.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._written = read_config(folder / CONFIG)
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

    def stored(self, name: str) -> torch.Tensor:
        """A published tensor; of tied embeddings the one is the other."""
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
        refuse_differences(str(self._files.source), wanted, found)


class HuggingFaceLlamaFormat(WeightFormat):
    """The folder as a format of the family."""

    name = "the Hugging Face layout of LLaMA"

    def matches(self, folder: Path) -> bool:
        """Whether its config.json says so."""
        path = folder / CONFIG
        return path.is_file() and read_config(path).get("model_type") == "llama"

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
        imported: Mapping[str, Any] = source.imported or {"config": None, "dtypes": {}}

        def type_of(name: str) -> torch.dtype:
            stored = imported["dtypes"].get(name, imported["dtypes"].get(EMBEDDING, "float32"))
            return dtype or getattr(torch, stored)

        config = imported["config"] or model_config_to_llama(
            source.config, dtype or torch.float32, trained_length(source), end_of_text_id(source.tokenizer)
        )
        write_tensors(folder, source, rules, type_of, max_shard_bytes, progress)
        write_json(folder / CONFIG, _as_written(config, dtype))


def _as_written(config: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """config.json with what is now so: two matrices of the vocabulary, and the type where one was asked for."""
    changed: dict[str, Any] = {"tie_word_embeddings": False} if config.get("tie_word_embeddings") else {}
    if dtype is not None:
        keys = {"dtype", "torch_dtype"} & config.keys() or {"dtype"}
        changed |= dict.fromkeys(sorted(keys), str(dtype).removeprefix("torch."))
    return {**config, **changed}
