"""Options of how to generate, the same in every command that generates; and what they make of a folder's model.

An option that is not given has the default of the model's family. One that the family does not know is refused.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from cola_megatron.families import Family
    from cola_megatron.inference.settings import CommonSettings
    from cola_megatron.inference.text_model import TextModel

STEPS = typer.Option(None, help="Steps of the solver per block (Cola DLM: 16), or of denoising.")
SOLVER = typer.Option(None, help="Cola DLM: euler (default), heun (two evaluations per step) or adams_bashforth.")
GUIDANCE_SCALE = typer.Option(None, help="Cola DLM: 7, and 1 is no guidance. Masked diffusion: 0, which is none.")
GUIDANCE_INTERVAL = typer.Option(
    None, help="Cola DLM: flow times (1 is noise, 0 is clean) with guidance: low and high, as in 0.2 0.8."
)
REPETITION_PENALTY = typer.Option(None, help="1 is none; by default 1.1 for Cola DLM and none for the others.")
NOISE_SEED = typer.Option(None, help="Seed of all draws: 66.")
NOISE = typer.Option(
    None,
    help="Cola DLM: formula of the draws, published, or hashed for more than 10,000 ids, of which the published one "
    "makes pairs.",
)
FIRST_BLOCK = typer.Option(
    None,
    help="Cola DLM: for prompts that end inside a block: clean_condition (default), partial_repaint, left_pad, "
    "right_pad.",
)
SETTINGS = typer.Option(
    None, "--set", help="NAME=VALUE: any other setting of the model's family, such as remasking=random; repeatable."
)
EMA = typer.Option(False, "--ema", help="The averages of the weights that a run kept (training.ema_decay).")
PRECISION = typer.Option("fp32", help="Of weights and activations: fp32 or bf16.")


def open_model(source: Path, precision: str = "fp32", **options: Any) -> "TextModel":
    """The model of any family in a run folder, a checkpoint folder or an export; `options` are those of `load_model`.

    Raises:
        ConfigError: another precision than fp32 or bf16. UserError: no model.
    """
    require_precision(precision)
    import torch

    from cola_megatron.interface import load_model

    return load_model(source, dtype=torch.float32 if precision == "fp32" else torch.bfloat16, **options)


def name_of(source: Path, ema: bool) -> str:
    """What results call the model."""
    return f"{source} (averaged weights)" if ema else str(source)


def family_at(source: Path) -> "Family":
    """Of the model in a folder, without its weights; raises UserError where there is none."""
    from cola_megatron.conversion.open_model import open_model as open_source
    from cola_megatron.families import FAMILIES

    return FAMILIES[open_source(source).config.family]


def read_given(options: dict[str, Any], others: Sequence[str] | None = None) -> dict[str, Any]:
    """The options that were given, and those of `--set`; raises ConfigError for one that is no NAME=VALUE, or twice."""
    from cola_megatron.config import ConfigError
    from cola_megatron.config.yaml_files import read_value

    given = {name: value for name, value in options.items() if value is not None}
    for other in others or ():
        name, separator, text = other.partition("=")
        if not separator or not name:
            raise ConfigError(f"--set {other}: a setting has the form NAME=VALUE")
        if name in given:
            raise ConfigError(f"--set {other}: {name} is given twice")
        given[name] = read_value(text)
    return given


def settings_of(family: "Family", given: dict[str, Any]) -> "CommonSettings":
    """How a model of the family generates with these options.

    Raises:
        ConfigError: an option that is no setting of the family, or is out of range.
    """
    from cola_megatron.config import ConfigError
    from cola_megatron.inference.requests import read_settings

    try:
        settings = read_settings(family.settings, given, f"generation by {family.title}")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if given.get("guidance_scale") == 1.0 and given.get("guidance_interval", (0.0, 1.0)) != (0.0, 1.0):
        low, high = given["guidance_interval"]
        raise ConfigError(
            f"guidance_interval={low},{high} does nothing with guidance_scale=1, which is no guidance; leave it out"
        )
    return settings


def require_precision(precision: str) -> None:
    """Before anything long; raises ConfigError."""
    from cola_megatron.config import ConfigError

    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"precision={precision} must be fp32 or bf16")
