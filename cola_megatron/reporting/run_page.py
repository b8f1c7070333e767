"""The last words on a run: continuations of held-out texts, measurements, and the page that shows them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from cola_megatron import ColaDLM

ALL = 1_000_000
"""Held-out sequences to measure on: more than there are."""


@dataclass(frozen=True)
class Continuation:
    """How a model went on with a text, and how the text went on."""

    prompt: str
    text: str
    truth: str
    latents: "torch.Tensor"


def continue_held_out(
    model: "ColaDLM",
    data: str | Path,
    samples_file: Path,
    samples: int,
    prompt_tokens: int,
    new_tokens: int,
    guidance_scale: float,
) -> list[Continuation]:
    """Continues the beginnings of some held-out sequences and writes them as JSON.

    With lengths of whole blocks nothing is padded.
    """
    from cola_megatron.data import TokenShards

    shards = TokenShards(data, "held_out", verify="size")
    picked = [shards[index].tolist() for index in range(0, len(shards), max(1, len(shards) // samples))][:samples]
    outputs = model.generate(
        [tokens[:prompt_tokens] for tokens in picked],
        guidance_scale=guidance_scale,
        max_new_tokens=new_tokens,
        repetition_penalty=1.0,
        steps=16,
    )
    decode = model.tokenizer.decode
    found = [
        Continuation(
            decode(tokens[:prompt_tokens], skip_special_tokens=False),
            output.text,
            decode(tokens[prompt_tokens : prompt_tokens + new_tokens], skip_special_tokens=False),
            output.latents,
        )
        for tokens, output in zip(picked, outputs, strict=True)
    ]
    records = [{"prompt": item.prompt, "continuation": item.text, "truth": item.truth} for item in found]
    samples_file.parent.mkdir(parents=True, exist_ok=True)
    samples_file.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    return found


def summary_table(summary: dict[str, float]) -> list[tuple[str, str]]:
    """What a run came to, as (what, value)."""
    return [
        ("held-out reconstruction accuracy", f"{summary['reconstruction_accuracy']:.4f}"),
        ("flow-matching loss", f"{summary['flow_matching_loss']:.4f}"),
        ("loss of the best constant predictor", f"{summary['constant_predictor_loss']:.4f}"),
        ("tokens seen", f"{summary['tokens']:,}"),
        ("model FLOPs", f"{summary['model_flops']:.3e}"),
        ("training time", f"{summary['seconds']:,.0f} s"),
    ]


def write_page(
    folder: Path,
    title: str,
    stages: tuple[Path, Path],
    continuations: list[Continuation],
    table: list[tuple[str, str]],
    files: list[tuple[str, str]],
) -> Path:
    """Writes FOLDER/report.html about a run of both stages; returns its path."""
    from cola_megatron.reporting.page import Report, Sample, write_report

    return write_report(
        folder,
        Report(
            title=title,
            table=table,
            stage_one=stages[0],
            stage_two=stages[1],
            samples=[Sample(item.prompt, item.text, item.truth, item.latents) for item in continuations],
            files=files,
        ),
    )
