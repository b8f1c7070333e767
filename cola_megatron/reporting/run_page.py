"""The last words on a run: continuations of held-out texts, measurements, and the page that shows them."""

import json
import math
from collections.abc import Mapping
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
    """What a run came to, as (what, value); a stage 1 has no prior to speak of."""
    table = [("held-out reconstruction accuracy", f"{summary['reconstruction_accuracy']:.4f}")]
    if "flow_matching_loss" in summary:
        table += prior_table(summary)
    return [
        *table,
        ("tokens seen", f"{summary['tokens']:,}"),
        ("model FLOPs", f"{summary['model_flops']:.3e}"),
        ("training time", f"{summary['seconds']:,.0f} s"),
    ]


def prior_table(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """The prior's loss between what it must be held against, at the same fixed times and noise; and what it means."""

    def figure(name: str) -> str:
        error = metrics.get(f"{name}_standard_error")
        return f"{metrics[name]:.4f}" + (f" ± {1.96 * error:.4f}" if error is not None else "")

    rows = [
        ("flow-matching loss, uniform t", "flow_matching_loss"),
        ("  with the context of another text", "flow_matching_loss_shuffled_context"),
        ("  without context, every block alone", "flow_matching_loss_without_context"),
        ("  best linear denoiser of one latent", "linear_predictor_loss"),
        ("  best constant", "constant_predictor_loss"),
        ("gain from context", "context_gain"),
        ("  in nats per latent", "context_information"),
    ]
    found = [(what, figure(name)) for what, name in rows if name in metrics]
    return [*found, ("what the prior has learned", prior_in_words(metrics))]


def prior_in_words(metrics: Mapping[str, float]) -> str:
    """One sentence that the losses allow."""
    gain, error = metrics["context_gain"], metrics.get("context_gain_standard_error", math.inf)
    if metrics["flow_matching_loss"] >= metrics["linear_predictor_loss"]:
        return "nothing yet: a linear function of one noisy latent, blind to the text, predicts as well"
    if gain < 1.96 * error:
        return "the shape of single blocks; the text before a block helps by no more than chance"
    alone = metrics["flow_matching_loss_without_context"] - metrics["flow_matching_loss"]
    beyond = metrics["linear_predictor_loss"] - metrics["flow_matching_loss"]
    share = f", {alone / beyond:.0%} of what it gains over the linear denoiser" if alone <= beyond else ""
    return f"to use the text before a block: it lowers the loss by {gain:.3f}{share}"


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
