"""What to prepare, and how."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["PrepSettings"]

# streaming stores byte offsets inside a shard as uint32.
LARGEST_SHARD_BYTES = 2**32 - 1
# The header of a shard (its column description) is a few hundred bytes; a shard must hold it and a few sequences.
SHARD_HEADER_BYTES = 1024
LARGEST_TOKEN_BYTES = 4


class PrepSettings(BaseModel):
    """Settings of `data_prep.prepare.prepare`. All but `inputs`, `output` and `tokenizer` decide the shards' bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inputs: list[str] = Field(min_length=1)
    """Files (.txt, .md, .jsonl, .jsonl.gz), folders searched recursively for such files, or `embedded`: the
    documentation in the Python installation. Read in this order; files of a folder in the order of their paths."""
    output: Path
    """Folder to make."""
    text_field: str = "text"
    """Field of a JSONL line that holds the document."""
    sequence_length: int = Field(default=512, ge=1)
    """Tokens per sequence."""
    tokenizer: Path | None = None
    """A tokenizer.json to use as it is; None trains a byte-level BPE on the train documents."""
    vocab_size: int = Field(default=4096, ge=1)
    """Tokens of a trained tokenizer, special ones included; no effect on a given one."""
    held_out_fraction: float = Field(default=0.02, ge=0.0, lt=1.0)
    """Share of documents, chosen by a hash of their text, that go to the held-out split."""
    seed: int = Field(default=66, ge=0, lt=2**64)
    """Key of that hash."""
    shard_size_bytes: int = Field(default=64 * 2**20, le=LARGEST_SHARD_BYTES)
    """Largest size of one shard file, in bytes."""
    end_of_text: str = Field(default="<|endoftext|>", min_length=1)
    """Token that ends every document."""
    padding: str = Field(default="<|pad|>", min_length=1)
    """Token of padding; only its id is recorded, for training and generation."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Stop after this many tokens (both splits together, end-of-text tokens included); None reads everything."""

    @model_validator(mode="after")
    def _check(self) -> PrepSettings:
        smallest = SHARD_HEADER_BYTES + 4 * LARGEST_TOKEN_BYTES * self.sequence_length
        if self.shard_size_bytes < smallest:
            raise ValueError(f"shard_size_bytes must be at least {smallest} for sequences of {self.sequence_length}")
        if self.end_of_text == self.padding:
            raise ValueError("end_of_text and padding must be different tokens")
        return self
