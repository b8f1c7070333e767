"""`cola generate`: continue prompts."""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from launchers.generate_prompts import Prompt, as_line, read_prompts
from launchers.generation_options import (
    EMA,
    FIRST_BLOCK,
    GUIDANCE_INTERVAL,
    GUIDANCE_SCALE,
    NOISE,
    NOISE_SEED,
    PRECISION,
    REPETITION_PENALTY,
    SETTINGS,
    SOLVER,
    STEPS,
    family_at,
    open_model,
    read_given,
    require_precision,
    settings_of,
)
from launchers.output import print_json

if TYPE_CHECKING:
    from cola_megatron.inference.text_model import TextModel


def generate(
    model: Path = typer.Argument(..., help="Run folder, checkpoint folder, or an export."),
    prompt: list[str] = typer.Option(None, "--prompt", "-p", help="A prompt; repeat for several."),
    prompts_file: Path = typer.Option(
        None, help='Prompts: one per line, or in FILE.jsonl one {"prompt": ..., "id": ..., "max_new_tokens": ...} each.'
    ),
    interactive: bool = typer.Option(
        False, "--interactive", "-i", help="Continue lines of standard input, shown live."
    ),
    output: Path = typer.Option(None, help="JSONL file to write, one object per prompt in their order."),
    as_json: bool = typer.Option(False, "--json", help="JSON with texts and token ids."),
    max_new_tokens: int = typer.Option(None, help="32; rounded up to whole blocks."),
    steps: int = STEPS,
    solver: str = SOLVER,
    guidance_scale: float = GUIDANCE_SCALE,
    guidance_interval: tuple[float, float] = GUIDANCE_INTERVAL,
    temperature: float = typer.Option(None, help="0, the default, is greedy."),
    top_k: int = typer.Option(None, help="Draw from the K most likely tokens; 0: all."),
    top_p: float = typer.Option(None, help="Draw from the most likely tokens that together reach P; 1: all."),
    repetition_penalty: float = REPETITION_PENALTY,
    stop: list[str] = typer.Option(None, help="End before this text; repeat for several."),
    end_of_text: list[str] = typer.Option(None, help="End before this token, such as '<|endoftext|>'; repeatable."),
    noise_seed: int = NOISE_SEED,
    noise: str = NOISE,
    first_block: str = FIRST_BLOCK,
    repaint_until: float = typer.Option(None, help="partial_repaint: put the prompt back at flow times above this."),
    repaint_rounds: int = typer.Option(None, help="partial_repaint: how often each such step is done."),
    settings: list[str] = SETTINGS,
    batch_size: int = typer.Option(32, min=1, help="Prompts that are continued at once; texts do not depend on it."),
    preview_every: int = typer.Option(
        2, min=0, help="--interactive: show the block every so many steps; 0: when done."
    ),
    precision: str = PRECISION,
    ema: bool = EMA,
    tensor_parallel_size: int = typer.Option(1, min=1, help="Processes that share each matrix, under torchrun."),
) -> None:
    """Continue prompts, with a model of any family.

    Example: `cola generate runs/quickstart/export -p "The value of" --max-new-tokens 48`

    Example: `cola generate exports/my-model --prompts-file prompts.jsonl --output continuations.jsonl --stop "."`

    Example: `cola generate exports/my-model --interactive --preview-every 1`
    """
    from cola_megatron.config import ConfigError

    require_precision(precision)
    prompts = [Prompt(text) for text in prompt or []] + (read_prompts(prompts_file) if prompts_file is not None else [])
    if interactive and (prompts or output is not None or tensor_parallel_size > 1):
        raise ConfigError(
            "--interactive reads prompts from standard input: it goes with no --prompt, --prompts-file, "
            "--output or --tensor-parallel-size"
        )
    if not prompts and not interactive:
        raise ConfigError("give --prompt TEXT, --prompts-file FILE or --interactive")
    if output is not None and prompts_file is not None and output.resolve() == prompts_file.resolve():
        raise ConfigError(f"--output {output} would overwrite the prompts: give another file")
    named = {
        "max_new_tokens": max_new_tokens,
        "steps": steps,
        "solver": solver,
        "guidance_scale": guidance_scale,
        "guidance_interval": guidance_interval or None,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop or None,
        "noise_seed": noise_seed,
        "noise": noise,
        "first_block": first_block,
        "repaint_until": repaint_until,
        "repaint_rounds": repaint_rounds,
    }
    options = read_given(named, settings)
    chosen = settings_of(family_at(model), options)  # refuses what is out of range before a model is read
    options.setdefault("max_new_tokens", chosen.max_new_tokens)
    try:
        loaded = open_model(model, precision, ema=ema, tensor_parallel_size=tensor_parallel_size)
        options["end_of_text"] = [_token_id(loaded, token) for token in end_of_text or []]
        if interactive:
            from launchers.generate_terminal import converse

            shown = list(range(0, getattr(chosen, "steps", None) or 0, preview_every)) if preview_every else []
            converse(loaded, options, shown, as_json)
        else:
            _continue(loaded, prompts, options, batch_size, output, as_json)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _token_id(model: "TextModel", token: str) -> int:
    found = model.tokenizer.token_to_id(token) if model.tokenizer is not None else None
    if found is None:
        raise ValueError(f"end_of_text={token} is no token of this model's tokenizer")
    return found


def _continue(
    model: "TextModel",
    prompts: list[Prompt],
    options: dict[str, Any],
    batch_size: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """All prompts; lines of the output file are written in order, each as soon as those before it are there."""
    from tqdm import tqdm

    from cola_megatron.inference.text_generation import finished

    ids = [number if given.id is None else given.id for number, given in enumerate(prompts)]
    default = options["max_new_tokens"]
    lengths = [default if given.max_new_tokens is None else given.max_new_tokens for given in prompts]
    pieces = model.stream(
        [given.text for given in prompts], ids, batch_size=batch_size, **options | {"max_new_tokens": lengths}
    )
    results: dict[int, dict[str, Any]] = {}
    written = 0
    main = model.groups.is_main  # under tensor parallelism every process has the same results
    with ExitStack() as stack:
        file = stack.enter_context(output.open("w", encoding="utf-8")) if output is not None and main else None
        bar = stack.enter_context(
            tqdm(total=len(prompts), desc="prompts", file=sys.stderr, disable=True if file is None else None)
        )
        for index, generation in finished(pieces, len(prompts)):
            results[index] = prompts[index].result(generation, ids[index])
            bar.update()
            while file is not None and written in results:
                file.write(as_line(results[written]) + "\n")
                file.flush()
                written += 1
    if not main:
        return
    if as_json:
        print_json([results[index] for index in range(len(prompts))])
    elif output is None:
        for index, given in enumerate(prompts):
            text = results[index]["text"]
            print(f"{given.text}\033[1m{text}\033[0m\n" if sys.stdout.isatty() else f"{given.text}{text}\n")
