"""How a model goes on with held-out texts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cola_megatron.reporting.report import Row, Sample

if TYPE_CHECKING:
    from cola_megatron import ColaDLM


@dataclass(frozen=True)
class Sampling:
    """How many held-out texts are continued, and how."""

    samples: int = 4
    prompt_tokens: int = 48
    new_tokens: int = 48
    guidance_scale: float = 3.0
    steps: int = 16
    repetition_penalty: float = 1.0

    def fitting(self, length: int, block: int) -> Sampling:
        """The same for sequences of `length` tokens, in whole blocks, so that there is a truth to compare with."""
        half = max(block, length // 2 // block * block)
        prompt = min(self.prompt_tokens, half)
        values = {**self.__dict__, "prompt_tokens": prompt, "new_tokens": min(self.new_tokens, max(1, length - prompt))}
        return Sampling(**values)

    def rows(self) -> list[Row]:
        """For a page."""
        return [
            Row("prompt", f"{self.prompt_tokens} tokens", "the beginning of a held-out sequence"),
            Row("generated", f"{self.new_tokens} tokens", "in whole blocks, each given those before it"),
            Row("solver", f"Euler, {self.steps} steps for each block", "on a uniform grid from noise to data"),
            Row("guidance", f"{self.guidance_scale:g}", "s in v_uncond + s (v_cond - v_uncond); 1 is none"),
            Row("tokens", "greedy", "the most likely one at every position"),
            Row("repetition penalty", f"{self.repetition_penalty:g}", "1 is none"),
            Row("noise", "seed 66; of (seed, sample, block)", "no sample depends on the others"),
        ]


def continue_held_out(
    model: ColaDLM,
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

    if model.tokenizer is None:
        raise UserError("there is no tokenizer beside the model: texts cannot be shown")
    require_same_tokenizer(model.tokenizer_path, data)
    shards, prompt, count = TokenShards(data, "held_out", verify="size"), sampling.prompt_tokens, sampling.samples
    picked = [shards[index].tolist() for index in range(0, len(shards), max(1, len(shards) // count))][:count]
    outputs = model.generate(
        [tokens[:prompt] for tokens in picked],
        guidance_scale=sampling.guidance_scale,
        max_new_tokens=sampling.new_tokens,
        repetition_penalty=sampling.repetition_penalty,
        steps=sampling.steps,
    )

    def decode(tokens: list[int]) -> str:
        return model.tokenizer.decode(tokens, skip_special_tokens=False)

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
