"""The recipe of a data set: a YAML file, or options of `cola prep run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cola_megatron.config import Section
from cola_megatron.config.types import NOT_BOOL, PositiveFloat, PositiveInt, Share
from data_prep.clean.settings import CleaningSettings, DecontaminationSettings, DeduplicationSettings

__all__ = ["PackingSettings", "Recipe", "ShardSettings", "SourceSettings", "TokenizerSettings"]

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]

# The MDS format stores byte offsets inside a shard as uint32.
LARGEST_SHARD_BYTES = 2**32 - 1
# The header of a shard (its column description) is a few hundred bytes; a shard must hold it and a few sequences.
SHARD_HEADER_BYTES = 1024
LARGEST_TOKEN_BYTES = 4


class SourceSettings(Section):
    """One source of the mixture."""

    name: Name
    """Folder of its shards, and its name in every table."""
    inputs: Annotated[list[str], Field(min_length=1)]
    """Files, globs, folders (searched recursively) or fsspec URLs, read in this order, files of a folder or glob in
    the order of their paths; or `embedded`: the documentation in the Python installation."""
    format: Literal["auto", "text", "jsonl", "parquet", "csv", "warc", "webdataset", "huggingface"] = "auto"
    """`auto` goes by the names of the files, and by the content of those whose names say nothing."""
    text_field: str = "text"
    """JSON field, column of a table, or extension of a WebDataset member that holds the document; one inside of others
    by its path, such as `data.text`."""
    url_field: str | None = None
    """The field that says where the document came from; the URL rules need it. It must be in some of the documents, and
    with bad_documents=error in all."""
    bad_documents: Literal["error", "skip"] = "error"
    """A record that is no document (broken JSON, wrong field, invalid UTF-8) ends the run with its place, or is
    counted and left out."""
    cleaning: CleaningSettings | None = None
    """Rules of this source in place of the recipe's; `{}` is none of them."""
    deduplication: Literal["all", "exact", "none"] = "all"
    """For which of the recipe's kinds of duplicates it is searched; its documents remove and are removed by those."""
    most_removed: Share | None = None
    """As the recipe's, for this source."""
    epochs: PositiveFloat = 1.0
    """How often training sees each sequence for every time it sees one of a source with epochs 1."""
    weight: PositiveFloat | None = None
    """Share of the training samples relative to the other weights, whatever the sizes; all sources or none have it."""
    max_tokens: PositiveInt | None = None
    """Cap on its tokens (both splits together, end-of-text tokens included), shared out over its parts by size, so
    that all of them are represented."""


class TokenizerSettings(Section):
    """Which tokenizer, or how to train one."""

    path: Path | None = None
    """A tokenizer.json to use as it is; null trains a byte-level BPE on the cleaned train documents."""
    vocab_size: PositiveInt = 4096
    """Tokens of a trained tokenizer, special ones included; no effect on a given one."""
    training_bytes: PositiveInt = 2**30
    """About this much text is drawn from the documents, by hash, to train it."""
    end_of_text: Annotated[str, Field(min_length=1)] = "<|endoftext|>"
    """Token that ends every document."""
    padding: Annotated[str, Field(min_length=1)] = "<|pad|>"
    """Token that fills a sequence; training and generation learn its id from the manifest. `cut_and_fill` never pads:
    with it a given tokenizer may lack this one."""
    backend: Literal["auto", "tokenizers", "tiktoken"] = "auto"
    """What encodes. `tiktoken` makes the same ids seven times faster, where it can stand in for the tokenizer and gives
    the same ids on a sample: the proof is in `report.json`, and `tokenizers` does the rest. `auto` asks for that from
    64 MiB of sources on, where it is worth the seconds that a proof takes."""
    round_trip_share: Share = 0.01
    """Share of the documents, by hash, that are decoded again and compared with their text."""

    @model_validator(mode="after")
    def _check(self) -> TokenizerSettings:
        if self.end_of_text == self.padding:
            raise ValueError(f"padding={self.padding}: must be another token than end_of_text")
        return self


class PackingSettings(Section):
    """How documents become sequences of one length."""

    sequence_length: PositiveInt = 512
    """Tokens per sequence."""
    method: Literal["cut_and_fill", "best_fit"] = "cut_and_fill"
    """`cut_and_fill` cuts the stream of documents every sequence_length tokens; `best_fit` keeps documents whole where
    they fit (longer ones are cut to pieces of that length first) and fills up with padding."""
    open_sequences: PositiveInt = 1024
    """Best fit: sequences that may wait for a fitting document."""


class ShardSettings(Section):
    """The files that training reads."""

    format: Literal["mds", "webdataset"] = "mds"
    """mosaicml-streaming's format, or tars of .npy members."""
    compression: Literal["zstd"] | None = None
    """Compress each shard; the reader keeps the decompressed ones in its cache."""
    size_bytes: Annotated[int, Field(le=LARGEST_SHARD_BYTES), NOT_BOOL] = 64 * 2**20
    """Largest size of one shard before compression."""


class Recipe(Section):
    """What to prepare. Everything but `output`, `most_removed`, the backend and the place of the tokenizer decides the
    bytes of the shards."""

    output: Path
    """Folder to make."""
    sources: Annotated[list[SourceSettings], Field(min_length=1)]
    """The mixture. Of duplicates across sources the one in the earlier source stays."""
    cleaning: CleaningSettings | None = None
    """null keeps every document as it is."""
    deduplication: DeduplicationSettings | None = None
    decontamination: DecontaminationSettings | None = None
    tokenizer: TokenizerSettings = TokenizerSettings()
    packing: PackingSettings = PackingSettings()
    shards: ShardSettings = ShardSettings()
    held_out_fraction: Annotated[float, Field(ge=0, lt=1), NOT_BOOL] = 0.02
    """Share of documents, chosen by a hash of their text, that go to the held-out split."""
    held_out_longest: PositiveInt = 100_000
    """Characters: a longer document is trained on, as alone it could be most of a held-out split."""
    seed: Annotated[int, Field(ge=0, lt=2**64), NOT_BOOL] = 66
    """Key of every hash that chooses documents."""
    most_removed: Share = 0.5
    """The run stops where one rule removes a larger share of the documents of a source: hardly ever is that meant."""
    task_bytes: PositiveInt = 256 * 2**20
    """About how much of a source one task reads: what a kill loses at most, and how finely work is shared out."""

    @property
    def cleans(self) -> bool:
        """Whether documents are looked at before they are tokenised."""
        sections = [self.cleaning, self.deduplication, self.decontamination]
        return any(section is not None for section in sections + [source.cleaning for source in self.sources])

    def cleaning_of(self, source: SourceSettings) -> CleaningSettings:
        """The rules that look at the documents of a source."""
        own = source.cleaning if source.cleaning is not None else self.cleaning
        return own if own is not None else CleaningSettings()

    def most_removed_of(self, source: SourceSettings) -> float:
        """The largest share of a source that one rule may remove."""
        return self.most_removed if source.most_removed is None else source.most_removed

    def source(self, name: str) -> SourceSettings:
        """The source of that name."""
        return next(source for source in self.sources if source.name == name)

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"sources: two are named {name}; give each its own name")
        weights = [source.weight for source in self.sources]
        if any(weights) and not all(weights):
            missing = next(source.name for source in self.sources if source.weight is None)
            raise ValueError(f"sources: {missing} has no weight, others have one; give all of them one, or none")
        if any(weights) and any(source.epochs != 1 for source in self.sources):
            raise ValueError("sources: weight and epochs both say how often a source is seen; leave one out")
        smallest = SHARD_HEADER_BYTES + 4 * LARGEST_TOKEN_BYTES * self.packing.sequence_length
        if self.shards.size_bytes < smallest:
            raise ValueError(
                f"shards.size_bytes={self.shards.size_bytes}: must be at least {smallest} for sequences of "
                f"{self.packing.sequence_length}"
            )
        return self
