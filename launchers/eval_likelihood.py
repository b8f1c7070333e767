"""The commands of `cola eval` that ask for likelihoods: likelihood, robustness."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from launchers.generation_options import EMA, SETTINGS
from launchers.output import print_json

if TYPE_CHECKING:
    from cola_megatron.evaluation.likelihood import Texts

MODEL = typer.Argument(..., help="Run folder, checkpoint folder or published folder.")
DATA = typer.Option(None, help="Prepared folder whose held-out sequences are read; by default the run's own.")
FILE = typer.Option(None, help="Texts instead: one per line of FILE.txt, or a row each of JSONL, JSON, CSV, parquet.")
FIELD = typer.Option("text", help="--file: the field of a row that holds the text.")
LIMIT = typer.Option(None, min=1, help="Only the first texts.")
BATCH_SIZE = typer.Option(16, min=1, help="Latents of texts that are computed at once; no result depends on it.")
NOISE_SEED = typer.Option(66, help="Seed of all draws.")
TENSOR_PARALLEL_SIZE = typer.Option(1, min=1, help="Processes that share each matrix, under torchrun.")
AS_JSON = typer.Option(False, "--json", help="JSON instead of a table.")
TIMES = "0,0.05,0.1,0.15,0.2,0.25,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1"


def likelihood(
    model: Path = MODEL,
    data: Path = DATA,
    file: Path = FILE,
    field: str = FIELD,
    context_field: str = typer.Option(None, help="--file: the field with what goes before the text."),
    samples: int = typer.Option(None, help="Draws for each text; of Cola DLM 4 latents from its posterior."),
    steps: int = typer.Option(None, help="Cola DLM: steps of the solver, 32."),
    solver: str = typer.Option(
        None, help="Cola DLM: adams_bashforth (default), euler or heun (two evaluations per step)."
    ),
    divergence: str = typer.Option(
        None, help="Cola DLM: hutchinson (default), or exact: block_size * d passes backwards in place of one."
    ),
    noise_seed: int = typer.Option(None, help="Seed of all draws: 66."),
    settings: list[str] = SETTINGS,
    limit: int = LIMIT,
    ema: bool = EMA,
    batch_size: int = BATCH_SIZE,
    tensor_parallel_size: int = TENSOR_PARALLEL_SIZE,
    output: Path = typer.Option(None, help="JSON file to write, with the terms of every text."),
    as_json: bool = AS_JSON,
) -> None:
    """log p(text), or its bound with the terms of it, perplexity and bits per byte, of held-out sequences or of a file.

    Under torchrun the texts are shared out over the processes.

    Example: `cola eval likelihood runs/quickstart/stage2 --limit 16`

    Example: `cola eval likelihood exports/my-model --file pairs.jsonl --field answer --context-field question`
    """
    from cola_megatron.evaluation.likelihood import baselines, from_all_replicas, own_part, progress_bar, summarize
    from cola_megatron.evaluation.results import format_table
    from cola_megatron.inference.requests import read_settings
    from cola_megatron.records.json_files import write_json
    from launchers.generation_options import family_at, name_of, open_model, read_given

    named = {"samples": samples, "steps": steps, "solver": solver, "divergence": divergence, "noise_seed": noise_seed}
    given, family = read_given(named, settings), family_at(model)
    with _wrong_use():
        chosen = asdict(read_settings(family.likelihood_settings, given, f"a likelihood by {family.title}"))
    asked = _texts(model, data, file, field, context_field, limit)
    opened = open_model(model, ema=ema, tensor_parallel_size=tensor_parallel_size)
    groups = opened.groups
    contexts = None if asked.contexts is None else own_part(asked.contexts, groups)
    ids = own_part(range(len(asked.texts)), groups)
    with progress_bar("likelihood", groups.is_main) as progress, _wrong_use():
        own = opened.log_likelihood(
            own_part(asked.texts, groups), contexts, ids, batch_size=batch_size, progress=progress, **chosen
        )
    found = from_all_replicas(list(own), groups)
    if not groups.is_main:
        return
    summary = summarize(found)
    counted = baselines(asked, opened.vocab_size)
    document = {"model": name_of(model, ema), "settings": chosen, **summary.as_json(), "baselines": counted}
    if output is not None:
        write_json(output, {**document, "items": [result.as_json() for result in found]})
    if as_json:
        print_json(document)
    else:
        print(f"{summary.texts:,} texts, {summary.tokens:,} tokens")
        print(
            format_table([*summary.rows(), *([f"{name} counts", f"{nats:.4f}", ""] for name, nats in counted.items())])
        )


def robustness(
    model: Path = MODEL,
    data: Path = DATA,
    file: Path = FILE,
    field: str = FIELD,
    times: str = typer.Option(TIMES, help="Flow times, separated by commas: 0 is clean, 1 is noise."),
    noise_seed: int = NOISE_SEED,
    limit: int = LIMIT,
    batch_size: int = BATCH_SIZE,
    tensor_parallel_size: int = TENSOR_PARALLEL_SIZE,
    figure: Path = typer.Option(None, help="PNG file to write (`make setup EXTRAS=report`)."),
    as_json: bool = AS_JSON,
) -> None:
    """Share of tokens that the decoder still reads from latents noised to flow time t, and its cross entropy.

    Example: `cola eval robustness runs/quickstart/stage2 --times 0,0.25,0.5`
    """
    from cola_megatron import ColaDLM
    from cola_megatron.config import ConfigError
    from cola_megatron.evaluation.likelihood import curve_rows, from_all_replicas, joined, own_part, progress_bar
    from cola_megatron.evaluation.results import format_table
    from launchers.generation_options import family_at, open_model

    with _wrong_use():
        grid = [float(time) for time in times.split(",")]
    asked = _texts(model, data, file, field, None, limit)
    opened = open_model(model, tensor_parallel_size=tensor_parallel_size)
    if not isinstance(opened, ColaDLM):
        raise ConfigError(f"robustness is of latents, and {model} has none: its family is {family_at(model).title}")
    groups = opened.groups
    ids = own_part(range(len(asked.texts)), groups)
    with progress_bar("robustness", groups.is_main) as progress, _wrong_use():
        own = opened.reconstruction_curve(
            own_part(asked.texts, groups), grid, ids, batch_size=batch_size, noise_seed=noise_seed, progress=progress
        )
    curve = joined(from_all_replicas([own], groups))
    if not groups.is_main:
        return
    if figure is not None:
        from cola_megatron.reporting.figure_style import DOTS_PER_INCH
        from cola_megatron.reporting.figures import robustness_curve

        robustness_curve(curve.times, curve.accuracy, curve.cross_entropy).savefig(figure, dpi=DOTS_PER_INCH)
    if as_json:
        print_json({"model": str(model), "noise_seed": noise_seed, **curve.as_json()})
    else:
        print(format_table(curve_rows(curve)))


def _texts(
    model: Path, data: Path | None, file: Path | None, field: str, context_field: str | None, limit: int | None
) -> "Texts":
    from cola_megatron.config import ConfigError
    from cola_megatron.evaluation.likelihood import held_out_texts, texts_of_file

    if file is None:
        if context_field is not None:
            raise ConfigError("--context-field needs --file")
        return held_out_texts(model, data, limit)
    if data is not None:
        raise ConfigError("--data and --file exclude each other")
    return texts_of_file(file, field, context_field, limit)


@contextmanager
def _wrong_use() -> Iterator[None]:
    """What the library refuses as out of range is an option out of range."""
    from cola_megatron.config import ConfigError

    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from None
