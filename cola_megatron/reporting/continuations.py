"""How a model goes on with held-out texts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cola_megatron.config import RunConfig
from cola_megatron.families import family_of
from cola_megatron.inference.requests import read_settings
from cola_megatron.inference.settings import CommonSettings
from cola_megatron.inference.text_model import TextModel
from cola_megatron.reporting.report import Row, Sample

COMMON = {entry.name for entry in fields(CommonSettings)}


@dataclass(frozen=True)
class Sampling:
    """How many held-out texts are continued, and how."""

    samples: int = 4
    prompt_tokens: int = 48
    new_tokens: int = 48
    options: Mapping[str, Any] = field(default_factory=dict)
    """Settings of generation that are not the page's own, such as a `guidance_scale`."""

    def fitting(self, length: int, block: int) -> Sampling:
        """The same for sequences of `length` tokens, in whole blocks, so that there is a truth to compare with."""
        half = max(block, length // 2 // block * block)
        prompt = min(self.prompt_tokens, half)
        values = {**self.__dict__, "prompt_tokens": prompt, "new_tokens": min(self.new_tokens, max(1, length - prompt))}
        return Sampling(**values)

    def settings(self, config: RunConfig) -> CommonSettings:
        """How a model of this family generates for the page; raises ValueError for an option that it does not have."""
        family = family_of(config)
        return read_settings(family.settings, {**family.page.sampling, **self.options})

    def rows(self, config: RunConfig) -> list[Row]:
        """For a page."""
        settings = self.settings(config)
        own = [entry.name for entry in fields(settings) if entry.name not in COMMON]
        return [
            Row("prompt", f"{self.prompt_tokens} tokens", "the beginning of a held-out sequence"),
            Row("generated", f"{self.new_tokens} tokens", "in whole blocks where the model writes blocks"),
            Row("tokens", "greedy", "the most likely one at every position"),
            *(Row(name.replace("_", " "), str(getattr(settings, name)), "setting of the family") for name in own),
            Row("repetition penalty", f"{settings.repetition_penalty:g}", "1 is none"),
            Row("draws", f"seed {settings.noise_seed}", "of each sample alone: none depends on the others"),
        ]


def continue_held_out(
    model: TextModel,
    config: RunConfig,
    data: str | Path,
    samples_file: Path,
    sampling: Sampling,
) -> list[Sample]:
    """Continues the beginnings of some held-out sequences and writes them as JSON.

    With lengths of whole blocks nothing is padded.

    Raises:
        ShardError: the sequences cannot be read. UserError: the model has no prior, or no tokenizer.
    """
    from cola_megatron.data import TokenShards, require_same_tokenizer
    from cola_megatron.errors import UserError
    from cola_megatron.inference.text_stream import following

    tokenizer = model.tokenizer
    if tokenizer is None:
        raise UserError("there is no tokenizer beside the model: texts cannot be shown")
    require_same_tokenizer(model.tokenizer_path, data)
    shards, prompt, count = TokenShards(data, "held_out", verify="size"), sampling.prompt_tokens, sampling.samples
    picked = [shards[index].tolist() for index in range(0, len(shards), max(1, len(shards) // count))][:count]
    outputs = model.generate(
        [tokens[:prompt] for tokens in picked],
        max_new_tokens=sampling.new_tokens,
        **{**family_of(config).page.sampling, **sampling.options},
    )

    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=False)

    found = [
        Sample(
            decode(tokens[:prompt]),
            output.text,
            following(decode, tokens[:prompt])(tokens[prompt : prompt + sampling.new_tokens]),
            output.latents,
        )
        for tokens, output in zip(picked, outputs, strict=True)
    ]
    records = [{"prompt": item.prompt, "continuation": item.continuation, "truth": item.truth} for item in found]
    samples_file.parent.mkdir(parents=True, exist_ok=True)
    samples_file.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    return found
