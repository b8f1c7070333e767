"""Options of how to generate, the same in every command that generates; and what they make of a folder's model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from cola_megatron import ColaDLM

STEPS = typer.Option(16, help="Steps of the solver per block.")
SOLVER = typer.Option("euler", help="euler, heun (two evaluations per step) or adams_bashforth.")
GUIDANCE_SCALE = typer.Option(7.0, help="1 is no guidance.")
GUIDANCE_INTERVAL = typer.Option(
    (0.0, 1.0), help="Flow times (1 is noise, 0 is clean) with guidance: low and high, as in 0.2 0.8."
)
REPETITION_PENALTY = typer.Option(1.1, help="1 is none.")
NOISE_SEED = typer.Option(66, help="Seed of all draws.")
NOISE = typer.Option(
    "published", help="Formula of the draws; hashed: for more than 10,000 ids, of which the published one makes pairs."
)
FIRST_BLOCK = typer.Option(
    "clean_condition", help="For prompts that end inside a block; or partial_repaint, left_pad, right_pad."
)
PRECISION = typer.Option("fp32", help="Of weights and activations: fp32 or bf16.")


def open_model(source: Path, precision: str = "fp32", **options: Any) -> "ColaDLM":
    """A model from a published folder, a run folder or a checkpoint folder; `options` are those of `ColaDLM`.

    Raises:
        ConfigError: another precision than fp32 or bf16.
    """
    require_precision(precision)
    import torch

    from cola_megatron import ColaDLM
    from cola_megatron.families.cola.published import VAE_FOLDER

    options["dtype"] = torch.float32 if precision == "fp32" else torch.bfloat16
    if (source / VAE_FOLDER).is_dir():
        return ColaDLM.from_published(source, **options)
    return ColaDLM.from_checkpoint(source, **options)


def require_precision(precision: str) -> None:
    """Before anything long; raises ConfigError."""
    from cola_megatron.config import ConfigError

    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"precision={precision} must be fp32 or bf16")


def require_guidance(guidance_scale: float, guidance_interval: tuple[float, float]) -> None:
    """An interval says where guidance is on; without guidance it would be ignored. Raises ConfigError."""
    from cola_megatron.config import ConfigError

    if guidance_scale == 1.0 and guidance_interval != (0.0, 1.0):
        low, high = guidance_interval
        raise ConfigError(
            f"guidance_interval={low},{high} does nothing with guidance_scale=1, which is no guidance; leave it out"
        )
