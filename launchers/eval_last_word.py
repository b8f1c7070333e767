"""`cola eval last-word`: LAMBADA's task on held-out text of a run's own data."""

from pathlib import Path

import typer

from launchers.eval_benchmarks import BATCH_SIZE, MODEL, open_for_evaluation
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
    read_given,
)
from launchers.output import print_json


def last_word(
    model: Path = MODEL,
    data: Path = typer.Option(
        None, help="Prepared folder whose held-out sequences are read; by default the run's own."
    ),
    limit: int = typer.Option(None, min=1, help="Only the first items."),
    context_tokens: int = typer.Option(96, min=2, help="Tokens before the last word, at most; half as many at least."),
    training_tokens: int = typer.Option(
        2_000_000, min=0, help="Of training text that the guesses by counting are made of; 0 leaves them out."
    ),
    output: Path = typer.Option(None, help="JSON file to write, with every item."),
    batch_size: int = BATCH_SIZE,
    steps: int = STEPS,
    solver: str = SOLVER,
    guidance_scale: float = GUIDANCE_SCALE,
    guidance_interval: tuple[float, float] = GUIDANCE_INTERVAL,
    first_block: str = FIRST_BLOCK,
    repetition_penalty: float = REPETITION_PENALTY,
    noise_seed: int = NOISE_SEED,
    noise: str = NOISE,
    settings: list[str] = SETTINGS,
    precision: str = PRECISION,
    ema: bool = EMA,
    as_json: bool = typer.Option(False, "--json", help="JSON instead of a table."),
) -> None:
    """Predict the last word of held-out passages: a score that small models on small corpora begin to have.

    The items depend on the held-out sequences alone; beside the model stands what guesses by counting get right. Under
    torchrun the items are shared out over the processes.

    Example: `cola eval last-word runs/quickstart/stage2 --limit 200`
    """
    from cola_megatron.config import ConfigError
    from cola_megatron.conversion.open_model import open_model as open_source
    from cola_megatron.data import TokenShards
    from cola_megatron.evaluation.last_word import evaluate_last_word, last_word_task
    from cola_megatron.evaluation.likelihood import held_out_shards
    from cola_megatron.evaluation.passages import PassageRule
    from cola_megatron.evaluation.results import format_table
    from cola_megatron.parallel import initialize_parallel
    from cola_megatron.records.json_files import write_json

    named = {
        "steps": steps,
        "solver": solver,
        "guidance_scale": guidance_scale,
        "guidance_interval": guidance_interval or None,
        "first_block": first_block,
        "repetition_penalty": repetition_penalty,
        "noise_seed": noise_seed,
        "noise": noise,
    }
    given = read_given(named, settings)
    if open_source(model).tokenizer is None:
        raise ConfigError(f"{model} has no tokenizer.json, and passages are texts: put it beside the weights")
    held_out = held_out_shards(model, data)
    training = TokenShards(held_out.folder.place, "train", "size") if training_tokens else None
    task = last_word_task(held_out, PassageRule(context_tokens), limit, training, training_tokens)
    evaluated = open_for_evaluation(model, precision, ema, **given)
    found = evaluate_last_word(evaluated, task, initialize_parallel(), batch_size)
    if found is None:
        return
    document = found.as_json()
    if output is not None:
        write_json(output, {**document, "items": found.records})
    if as_json:
        print_json(document)
    else:
        print(f"{len(found.records):,} items of {found.sequences:,} held-out sequences")
        print(format_table(found.rows()))
