"""The benchmark commands of `cola eval`: score, run, table, lm-eval."""

import os
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

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
    name_of,
    open_model,
    read_given,
    require_precision,
    settings_of,
)
from launchers.output import print_json

if TYPE_CHECKING:
    from cola_megatron.evaluation.model import GeneratorModel
    from cola_megatron.evaluation.results import TaskResult

MODEL = typer.Argument(..., help="Published folder, run folder or checkpoint folder.")
BATCH_SIZE = typer.Option(20, min=1, help="Prompts that are continued at once; texts do not depend on it.")


def score(
    file: Path = typer.Argument(..., help="JSONL with id, generation, ground_truth and, where there are any, choices."),
    task: str = typer.Option(..., help="The task whose matching rule applies, such as lambada."),
    as_json: bool = typer.Option(False, "--json", help='{"accuracy": percent, "items": [{"id": ..., "correct": ...}]}'),
) -> None:
    """Score generations that exist already, by the published post-processing and matching.

    Example: `cola eval score --task lambada generations.jsonl --json`
    """
    from cola_megatron.evaluation.results import format_table, percentages
    from cola_megatron.evaluation.score_file import score_file
    from cola_megatron.evaluation.statistics import wilson_interval
    from cola_megatron.evaluation.tasks import task_named

    verdicts = score_file(task_named(task), file)
    interval = wilson_interval(sum(verdict["correct"] for verdict in verdicts), len(verdicts))
    if as_json:
        print_json({"accuracy": 100 * interval.value, "items": verdicts})
    else:
        rows = [["task", "accuracy", "95% interval", "items"], [task, *percentages(interval), str(len(verdicts))]]
        print(format_table(rows))


def run(
    model: Path = MODEL,
    tasks: str = typer.Option("all", help="Task names, separated by commas."),
    data: Path = typer.Option(..., help="Folder with TASK.jsonl, or a copy of the dataset in TASK/, for every task."),
    output: Path = typer.Option(..., help="Folder to write; the same command goes on where it was stopped."),
    limit: int = typer.Option(None, min=1, help="Only the first items of every task."),
    batch_size: int = BATCH_SIZE,
    steps: int = STEPS,
    solver: str = SOLVER,
    guidance_scale: float = GUIDANCE_SCALE,
    guidance_interval: tuple[float, float] = GUIDANCE_INTERVAL,
    first_block: str = FIRST_BLOCK,
    max_new_tokens: int = typer.Option(None, min=1, help="By default the task's own: 32."),
    temperature: float = typer.Option(0.0, min=0.0, help="0 is greedy."),
    repetition_penalty: float = REPETITION_PENALTY,
    noise_seed: int = NOISE_SEED,
    noise: str = NOISE,
    settings: list[str] = SETTINGS,
    precision: str = PRECISION,
    ema: bool = EMA,
    as_json: bool = typer.Option(False, "--json", help="The table as JSON."),
) -> None:
    """Evaluate a model on the published tasks: OUTPUT/TASK.json with every item, and a table.

    Under torchrun the items are shared out over the processes. Nothing is downloaded.

    Example: `cola eval run runs/quickstart/export --tasks lambada,squad --data benchmarks --output results --limit 20`

    Example: `cola eval run exports/my-model --data benchmarks --output results/heun --solver heun --steps 8
    --guidance-interval 0.2 0.8`
    """
    from cola_megatron.evaluation.harness import evaluate_task
    from cola_megatron.evaluation.items import read_items
    from cola_megatron.evaluation.tasks import tasks_named
    from cola_megatron.parallel import initialize_parallel

    wanted = {}
    for task in tasks_named(tasks):
        decoding = replace(task.decoding, temperature=temperature)
        if max_new_tokens is not None:
            decoding = replace(decoding, max_new_tokens=max_new_tokens)
        wanted[task.name] = (replace(task, decoding=decoding), read_items(data, task, limit))
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
    evaluated = open_for_evaluation(model, precision, ema, **read_given(named, settings))
    groups = initialize_parallel()
    results = {}
    for name, (task, items) in wanted.items():
        result = evaluate_task(evaluated, task, items, output, groups, batch_size)
        if result is not None:
            results[name] = result
    if groups.is_main:
        _print_results({"accuracy": results}, as_json)


def table(
    results: list[Path] = typer.Argument(..., help="Folders that `cola eval run` wrote, or single TASK.json files."),
    as_json: bool = typer.Option(False, "--json", help="The table as JSON."),
) -> None:
    """Finished results side by side, with 95% confidence intervals and the average over the tasks that all have.

    Example: `cola eval table results/small results/base`
    """
    from cola_megatron.evaluation.results import read_results

    _print_results({str(source): read_results(source) for source in results}, as_json)


def lm_eval(
    model: Path = MODEL,
    tasks: str = typer.Option(..., help="Names of lm-eval's tasks, separated by commas."),
    include_path: Path = typer.Option(None, help="A folder with task files of your own."),
    shots: int = typer.Option(None, min=0, help="Few-shot examples; by default the task's own number."),
    limit: int = typer.Option(None, min=1, help="Only the first items of every task."),
    download: bool = typer.Option(False, help="Let lm-eval fetch the data that is not here."),
    output: Path = typer.Option(None, help="A JSON file to write, with every sample."),
    batch_size: int = BATCH_SIZE,
    steps: int = STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
    repetition_penalty: float = REPETITION_PENALTY,
    likelihood_samples: int = typer.Option(
        None, help="Likelihoods: draws for each text. Cola DLM: 4 of its latents; autoregressive models need none."
    ),
    likelihood_steps: int = typer.Option(None, help="Likelihoods of Cola DLM: steps of the solver, 32."),
    settings: list[str] = SETTINGS,
    noise_seed: int = NOISE_SEED,
    noise: str = NOISE,
    as_json: bool = typer.Option(False, "--json", help="JSON instead of a table."),
) -> None:
    """Run tasks of lm-eval's catalogue (`make setup EXTRAS=eval`). Nothing is downloaded unasked.

    Example: `cola eval lm-eval runs/quickstart/export --tasks triviaqa --limit 20`
    """
    if not download:
        # Read once, when these libraries are imported: before lm-eval is.
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    from cola_megatron.evaluation.lm_eval_adapter import evaluate_catalogue
    from cola_megatron.parallel import initialize_parallel

    named = {
        "steps": steps,
        "guidance_scale": guidance_scale,
        "repetition_penalty": repetition_penalty,
        "noise_seed": noise_seed,
        "noise": noise,
        "likelihood_samples": likelihood_samples,
        "likelihood_steps": likelihood_steps,
    }
    evaluated = open_for_evaluation(model, **read_given(named, settings))
    groups = initialize_parallel()
    results = evaluate_catalogue(evaluated, tasks.split(","), groups, batch_size, include_path, shots, limit)
    if results is None:
        return
    if output is not None:
        output.write_text(results.as_json())
    if as_json:
        print_json(results.metrics)
    else:
        print(results.table)


def open_for_evaluation(source: Path, precision: str = "fp32", ema: bool = False, **settings: Any) -> "GeneratorModel":
    """A folder's model as the harness sees it.

    Args:
        precision: of weights and activations, fp32 or bf16.
        ema: the averages of the weights in their place.
        settings: of generation by its family, and of its likelihood with `likelihood_` before their names. The seed is
            one for both.

    Raises:
        ConfigError: a setting out of range, or none of the family. UserError: a model that cannot generate.
    """
    from cola_megatron.config import ConfigError
    from cola_megatron.evaluation.model import GeneratorModel
    from cola_megatron.inference.requests import read_settings

    require_precision(precision)
    family, prefix = family_at(source), "likelihood_"
    own = {name.removeprefix(prefix): value for name, value in settings.items() if name.startswith(prefix)}
    chosen = settings_of(family, {name: value for name, value in settings.items() if not name.startswith(prefix)})
    if any(field.name == "noise_seed" for field in fields(family.likelihood_settings)):
        own = {"noise_seed": chosen.noise_seed, **own}
    try:
        likelihood = read_settings(family.likelihood_settings, own, f"a likelihood by {family.title}")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    model = open_model(source, precision, ema=ema)
    model.require_generation()
    return GeneratorModel(model, name_of(source, ema), chosen, asdict(likelihood))


def _print_results(columns: "dict[str, dict[str, TaskResult]]", as_json: bool) -> None:
    from cola_megatron.evaluation.results import comparison, format_table, summary

    if not as_json:
        print(format_table(comparison(columns)))
    elif len(columns) == 1:
        print_json(summary(*columns.values()))
    else:
        print_json({name: summary(results) for name, results in columns.items()})
