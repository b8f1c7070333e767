"""Recipes of data sets from files and from options, and what they would do."""

from importlib import resources
from pathlib import Path
from typing import Any

from cola_megatron.config import ConfigError, load_tree, resolve_tree
from data_prep.losses import left_out_lines
from data_prep.plan import make_plan, work_folder_of
from data_prep.recipe import Recipe
from data_prep.steps import steps_of
from launchers.recipe_files import refuse_unclear_keys


def from_file(path: Path, overrides: list[str], output: Path | None) -> Recipe:
    """A YAML file, or the name of a recipe that ships with the package, with overrides; raises ConfigError."""
    if not path.is_file() and path.suffix == "" and len(path.parts) == 1:
        shipped = resources.files("data_prep.recipes")
        names = sorted(entry.name.removesuffix(".yaml") for entry in shipped.iterdir() if entry.name.endswith(".yaml"))
        if path.name not in names:
            raise ConfigError(f"{path}: neither a recipe file nor one of the recipes {', '.join(names)}")
        path = Path(str(shipped / f"{path.name}.yaml"))
    refuse_unclear_keys(path, overrides)
    return load_tree(Recipe, path, [*overrides, *([f"output={output}"] if output is not None else [])])


def from_options(inputs: list[str], output: Path, source: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    """One source, nothing cleaned; raises ConfigError."""
    name = "embedded" if inputs == ["embedded"] else "text"
    return resolve_tree(
        Recipe, {"output": output, "sources": [{"name": name, "inputs": inputs, **(source or {})}], **sections}
    )


def refuse_nothing_held_out(recipe: Recipe) -> None:
    """Raises ConfigError for a recipe of which every training would say, at its start, that it cannot measure."""
    if recipe.held_out_fraction == 0:
        raise ConfigError(
            "held_out_fraction=0: training measures on documents that were held out, and is refused without any; give "
            "0.001 for few of them"
        )


def describe(recipe: Recipe) -> str:
    """Sources with their parts and bytes, and steps with their tasks."""
    plan = make_plan(recipe)
    lines = []
    for source in recipe.sources:
        inputs = [each for each in plan.inputs if each.source == source.name]
        parts = [part for each in inputs for part in each.parts]
        formats = ", ".join(sorted({part.format for part in parts}))
        size = sum(part.bytes for part in parts)
        lines.append(f"source {source.name}: {len(parts):,} parts ({formats}), {size:,} bytes in {len(inputs):,} tasks")
    lines += left_out_lines(plan.left_out)
    work = work_folder_of(recipe.output)
    for step in steps_of(plan):
        done = sum(work.is_finished(step.name, task) for task in range(step.tasks))
        lines.append(f"step {step.name}: {step.tasks} tasks" + (f", {done} finished" if done else ""))
    return "\n".join([*lines, f"output {recipe.output.expanduser().absolute()}, work folder {work.path}"])
