"""What adaptive steps save, and what they change: the tokens of a model with `settle_every` against those of all steps.

    python -m tools.adaptive_steps EXPORT                        a few prompts of our own
    python -m tools.adaptive_steps EXPORT --prompts-file FILE    one prompt a line
    python -m tools.adaptive_steps EXPORT --steps 32 --max-new-tokens 64 --json

A share of equal tokens is of all positions; behind the first token that differs a text goes its own way, so the share
of texts that begin alike falls faster than the share of blocks that settle wrongly. That one is of first blocks, which
have the same context in both.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from cola_megatron.inference.protocol import Request, TokenBlock
from cola_megatron.inference.requests import read_settings
from cola_megatron.inference.settings import FlowSettings
from cola_megatron.interface import ColaDLM, load_model

PROMPTS = ("The value of", "In the beginning", "A function that", "She said that", "def main(", "The city of")


def blocks_of(model: ColaDLM, prompts: list[str], settings: FlowSettings) -> tuple[list[list[TokenBlock]], float]:
    """The blocks of each prompt alone, as one user waits for them, and the seconds that they took."""
    assert model.tokenizer is not None, "an export has a tokenizer"
    padding, found = model.tokenizer.token_to_id("<|pad|>") or 0, []
    began = time.process_time()
    for number, prompt in enumerate(prompts):
        ids = model.tokenizer.encode(prompt, add_special_tokens=False).ids
        session = model.start([Request(ids, number)], settings, padding)
        of_prompt = []
        while session.running:
            of_prompt += [block for block in session.advance() if isinstance(block, TokenBlock)]
        found.append(of_prompt)
    return found, time.process_time() - began


def compare(model: ColaDLM, prompts: list[str], every: int, options: dict[str, float]) -> dict[str, float]:
    """Adaptive against all steps; times are of this process's cores, and the two run one after the other."""
    whole, seconds = blocks_of(model, prompts, read_settings(FlowSettings, options))
    found, less = blocks_of(model, prompts, read_settings(FlowSettings, options | {"settle_every": every}))
    pairs = [pair for texts in zip(found, whole, strict=True) for pair in zip(*texts, strict=True)]
    tokens = [
        ours == theirs for one, other in pairs for ours, theirs in zip(one.token_ids, other.token_ids, strict=True)
    ]
    first = [texts[0][0].token_ids == texts[1][0].token_ids for texts in zip(found, whole, strict=True)]
    taken = [one.steps for one, _ in pairs if one.steps is not None]
    return {
        "settle_every": every,
        "tokens_equal": sum(tokens) / len(tokens),
        "first_blocks_equal": sum(first) / len(first),
        "steps_saved": 1 - sum(taken) / (len(taken) * options["steps"]),
        "time": less / seconds,
    }


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts-file", type=Path)
    parser.add_argument("--every", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--guidance-scale", type=float, default=7.0)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    model = load_model(chosen.model, device="cpu")
    assert isinstance(model, ColaDLM), "adaptive steps are of a flow"
    prompts = list(PROMPTS) if chosen.prompts_file is None else chosen.prompts_file.read_text().splitlines()
    options = {name: getattr(chosen, name) for name in ("steps", "max_new_tokens", "guidance_scale")}
    found = [compare(model, prompts, every, options) for every in chosen.every]
    if chosen.json:
        print(json.dumps(options | {"prompts": len(prompts), "results": found}, indent=1))
        return 0
    print("".join(f"{name:>20}" for name in found[0]))
    for row in found:
        print(f"{row['settle_every']:>20}" + "".join(f"{value:>20.3f}" for value in list(row.values())[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
