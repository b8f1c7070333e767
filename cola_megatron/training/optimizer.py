"""The optimiser's groups and the learning-rate schedule."""

import math
from collections.abc import Callable, Collection

import torch
import torch.distributed as dist

from cola_megatron.config import ConfigError, RunConfig, TrainingConfig
from cola_megatron.models.pipelined import PipelinedModel
from cola_megatron.parallel import ProcessGroups
from cola_megatron.parallel.muon import MuonAdamW
from cola_megatron.parallel.parameters import marks_of


def parameter_groups(model: PipelinedModel, config: RunConfig) -> list[dict]:
    """Groups by network, by decay (matrices, vectors), by optimiser and by what a role says of rate and epsilon.

    `learning_rate_ratio` is relative to the schedule's rate.
    """
    optimizer, ratios = config.training.optimizer, model.learning_rate_ratios()
    groups: dict[tuple[str, bool, bool, float, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        network, decays = name.split(".")[0], len(getattr(parameter, "ds_shape", parameter.shape)) > 1
        role = marks_of(parameter).role
        muon = optimizer.name == "muon" and role.muon_rate is not None
        rate, eps = (role.muon_rate, 1.0) if muon and role.muon_rate is not None else (role.rate, role.eps)
        group = groups.setdefault(
            (network, decays, muon, rate, eps),
            {
                "params": [],
                "network": network,
                "muon": muon,
                "learning_rate_ratio": ratios.get(network, 1.0) * rate,
                "weight_decay": optimizer.weight_decay / rate if decays else 0.0,
                "eps": optimizer.eps * eps,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(model: PipelinedModel, config: RunConfig, groups: ProcessGroups) -> torch.optim.AdamW:
    """Of the trained parameters of this stage; its learning rates are set anew before every step.

    Raises:
        ConfigError: a pipeline stage with too few tensors.
    """
    optimizer = config.training.optimizer
    on_cuda = next(model.parameters()).is_cuda
    split = as_many_on_every_stage(parameter_groups(model, config), groups)
    if optimizer.name == "adamw":
        return torch.optim.AdamW(split, lr=optimizer.learning_rate, betas=optimizer.betas, fused=on_cuda)
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    return MuonAdamW(
        split,
        momentum=optimizer.momentum,
        dtype=dtype,
        lr=optimizer.learning_rate,
        betas=optimizer.betas,
        fused=on_cuda,
    )


def as_many_on_every_stage(parameter_groups: list[dict], groups: ProcessGroups) -> list[dict]:
    """Splits groups until every pipeline stage has the same number of them.

    ZeRO sums the gradient norm group by group over all stages, and a stage without a partner would wait forever.

    Raises:
        ConfigError: a stage has fewer tensors than another has groups.
    """
    if groups.pipeline_parallel_size == 1:
        return parameter_groups
    wanted = torch.tensor(len(parameter_groups), device=groups.device)
    dist.all_reduce(wanted, op=dist.ReduceOp.MAX, group=groups.pipeline_group)
    tensors = sum(len(group["params"]) for group in parameter_groups)
    fewest = torch.tensor(tensors, device=groups.device)
    dist.all_reduce(fewest, op=dist.ReduceOp.MIN, group=groups.pipeline_group)
    if fewest < wanted:
        raise ConfigError(
            f"a pipeline stage holds {int(fewest)} trained tensors, and every stage needs {int(wanted)}; use fewer "
            "stages or give it more steps with parallel.pipeline_split"
        )
    split = list(parameter_groups)
    while len(split) < wanted:
        largest = max(split, key=lambda group: len(group["params"]))
        half = len(largest["params"]) // 2
        split = [group for group in split if group is not largest]
        split += [{**largest, "params": part} for part in (largest["params"][:half], largest["params"][half:])]
    return split


def learning_rate(training: TrainingConfig, step: int) -> float:
    """Of a step, from 0: linear warm-up from the initial rate, the peak, decay to the final rate, constant after."""
    schedule, peak = training.schedule, training.optimizer.learning_rate
    if step < schedule.warmup_steps:
        share = (step + 1) / schedule.warmup_steps
        return schedule.initial_learning_rate + share * (peak - schedule.initial_learning_rate)
    begin = schedule.warmup_steps if schedule.decay_from is None else schedule.decay_from
    if step < begin:
        return peak
    if step >= schedule.decay_steps:
        return schedule.final_learning_rate
    left = _SHARE_LEFT[schedule.decay]((step - begin) / (schedule.decay_steps - begin))
    return schedule.final_learning_rate + (peak - schedule.final_learning_rate) * left


_SHARE_LEFT: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
    "1-sqrt": lambda progress: 1.0 - math.sqrt(progress),
}
"""Of the way from the peak to the final rate, what is left when so much of the decay is over."""


def set_learning_rates(groups: list[dict], rate: float, idle: Collection[str]) -> None:
    """Writes the rate of this step into the optimiser's groups; a network that is idle in this step has rate 0.

    At rate 0 AdamW changes nothing (decay is multiplied by the rate as well); its moments decay meanwhile.
    """
    for group in groups:
        group["lr"] = 0.0 if group["network"] in idle else rate * group["learning_rate_ratio"]
