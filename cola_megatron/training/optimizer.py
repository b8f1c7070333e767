"""AdamW groups and the learning-rate schedule."""

import math

import torch
from torch import nn

from cola_megatron.config import RunConfig, TrainingConfig


def parameter_groups(model: nn.Module, config: RunConfig) -> list[dict]:
    """Groups by network (VAE, DiT) and by decay (matrices, vectors); `learning_rate_ratio` is relative to the DiT's."""
    optimizer = config.training.optimizer
    vae_ratio = config.training.vae_update.learning_rate_ratio if config.stage == 2 else 1.0
    groups: dict[tuple[str, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        network, decays = name.split(".")[0], len(getattr(parameter, "ds_shape", parameter.shape)) > 1
        group = groups.setdefault(
            (network, decays),
            {
                "params": [],
                "network": network,
                "learning_rate_ratio": vae_ratio if network == "vae" else 1.0,
                "weight_decay": optimizer.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """AdamW over the trained parameters; its learning rates are set anew before every step."""
    optimizer = config.training.optimizer
    on_cuda = next(model.parameters()).is_cuda
    return torch.optim.AdamW(
        parameter_groups(model, config),
        lr=optimizer.learning_rate,
        betas=optimizer.betas,
        eps=optimizer.eps,
        fused=on_cuda,
    )


def learning_rate(training: TrainingConfig, step: int) -> float:
    """Linear warm-up from the initial rate, cosine to the final one at `decay_steps`, constant after."""
    schedule, peak = training.schedule, training.optimizer.learning_rate
    if step < schedule.warmup_steps:
        share = (step + 1) / schedule.warmup_steps
        return schedule.initial_learning_rate + share * (peak - schedule.initial_learning_rate)
    progress = min(1.0, (step - schedule.warmup_steps) / (schedule.decay_steps - schedule.warmup_steps))
    return schedule.final_learning_rate + 0.5 * (peak - schedule.final_learning_rate) * (
        1.0 + math.cos(math.pi * progress)
    )


def set_learning_rates(groups: list[dict], rate: float, train_vae: bool) -> None:
    """Writes the rate of this step into the optimiser's groups; a frozen VAE step has rate 0 for the VAE.

    At rate 0 AdamW changes nothing (decay is multiplied by the rate as well); its moments decay meanwhile.
    """
    for group in groups:
        frozen = group["network"] == "vae" and not train_vae
        group["lr"] = 0.0 if frozen else rate * group["learning_rate_ratio"]
