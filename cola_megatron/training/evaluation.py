"""Held-out measurements of a model in training. Draws are fixed, so that measurements of one run compare.

Shapes as in `models/cola.py`.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from cola_megatron.config import RunConfig
from cola_megatron.data import TokenShards
from cola_megatron.models.cola import Cola
from cola_megatron.models.dit import two_copy_times
from cola_megatron.objectives import flow_matching, vae
from cola_megatron.objectives.randomness import draw_times, generator
from cola_megatron.parallel import ProcessGroups
from cola_megatron.parallel.megatron import gather_from_tensor_model_parallel_region

ROBUSTNESS_TIMES = (0.0, 0.25, 0.5)


@dataclass
class _Sums:
    """Sums over sequences; added over the data-parallel ranks at the end."""

    values: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, name: str, value: torch.Tensor) -> None:
        value = value.detach().double().reshape(-1)
        self.values[name] = self.values[name] + value if name in self.values else value

    def over_replicas(self, groups: ProcessGroups) -> dict[str, torch.Tensor]:
        mine = torch.cat([value.to(groups.device) for value in self.values.values()])
        total = (groups.mean_over_data_parallel(mine) * groups.data_parallel_size).cpu()
        return dict(zip(self.values, total.split([value.numel() for value in self.values.values()]), strict=True))


@torch.no_grad()
def evaluate(model: Cola, shards: TokenShards, config: RunConfig, groups: ProcessGroups) -> dict[str, float]:
    """Measures on the first held-out sequences, the same ones each time and for any number of replicas.

    Returns:
        `reconstruction_accuracy` (of the posterior mean) and `reconstruction_accuracy_t250`, `_t500` (of the latent
        at flow time 0.25, 0.5), `reconstruction_nll`, `vae_logsnr` (where there is a variance); in stage 2
        `flow_matching_loss`, `constant_predictor_loss` (both at the training distribution of t) and
        `flow_matching_loss_bin_<i>` over equal bins of t in [0, 1].
    """
    model.eval()
    sums = _Sums()
    replicas, micro = groups.data_parallel_size, config.training.micro_batch_size
    samples = min(config.training.evaluation.samples, len(shards))
    mine = list(range(groups.data_parallel_rank, samples, replicas))
    # ZeRO 3 gathers parameters in step: every replica runs as many batches, the last ones perhaps without weight.
    for start in range(0, -(-samples // replicas), micro):
        batch = mine[start : start + micro]
        weight_B = torch.ones(len(batch), device=groups.device) if batch else torch.zeros(1, device=groups.device)
        _measure(model, shards, config, groups, batch or [0], weight_B, sums)
    model.train()
    return _metrics(sums.over_replicas(groups), config)


def _measure(
    model: Cola,
    shards: TokenShards,
    config: RunConfig,
    groups: ProcessGroups,
    samples: list[int],
    weight_B: torch.Tensor,
    sums: _Sums,
) -> None:
    device, latents, channels = groups.device, config.latent_length, config.model.vae.latent_dim
    tokens_BL = torch.from_numpy(np.stack([shards[sample] for sample in samples])).to(device)

    def draw(purpose: str) -> torch.Tensor:
        draws = [
            generator(config.seed, f"evaluation {purpose}", sample, 0).standard_normal((latents, channels), np.float32)
            for sample in samples
        ]
        return torch.from_numpy(np.stack(draws, axis=1)).to(device)

    posterior, z1_SBC = model.vae.encoder(tokens_BL), draw("flow")
    sums.add("latents", latents * weight_B.sum())
    sums.add("tokens", tokens_BL.shape[1] * weight_B.sum())
    sums.add("mean_square", posterior.mean.square().sum((0, 2)) @ weight_B)
    if posterior.logvar is not None:
        sums.add("variance", posterior.logvar.exp().sum((0, 2)) @ weight_B)
    mean_SBC = model.vae.to_prior(posterior.mean)
    for t in ROBUSTNESS_TIMES:
        logits_TBV = model.vae.decoder((1 - t) * mean_SBC + t * z1_SBC)
        if groups.tensor_parallel_size > 1:
            logits_TBV = gather_from_tensor_model_parallel_region(logits_TBV)
        sums.add(f"correct_{t}", (logits_TBV.argmax(-1) == tokens_BL.t()).sum(0).float() @ weight_B)
        if t == 0.0:
            nll_BT = torch.nn.functional.cross_entropy(logits_TBV.permute(1, 2, 0).float(), tokens_BL, reduction="none")
            sums.add("nll", nll_BT.sum(1) @ weight_B)
    if model.dit is not None:
        z0_SBC = model.vae.to_prior(vae.sample_posterior(posterior, draw("posterior")))
        _measure_flow(model, config, samples, weight_B, z0_SBC, z1_SBC, sums)


def _measure_flow(
    model: Cola,
    config: RunConfig,
    samples: list[int],
    weight_B: torch.Tensor,
    z0_SBC: torch.Tensor,
    z1_SBC: torch.Tensor,
    sums: _Sums,
) -> None:
    blocks, bins = config.latent_length // config.model.dit.block_size, config.training.evaluation.time_bins

    def error(time_BN: np.ndarray) -> torch.Tensor:
        return _flow_error(model, config, z0_SBC, z1_SBC, torch.from_numpy(time_BN).to(z0_SBC.device))

    streams = [generator(config.seed, "evaluation time", sample, 0) for sample in samples]
    at_training_times_SB = error(np.stack([draw_times(s, config.objective.flow.time, blocks) for s in streams]))
    sums.add("flow", at_training_times_SB.sum(0) @ weight_B)
    target_SBC = (z1_SBC - z0_SBC).double()
    sums.add("target_sum", target_SBC.sum(0).t() @ weight_B.double())
    sums.add("target_square", target_SBC.square().sum((0, 2)) @ weight_B.double())

    uniform_BN = np.stack([s.random(blocks, dtype=np.float32) for s in streams])
    error_BN = error(uniform_BN).unflatten(0, (blocks, -1)).mean(1).t().double().cpu()
    bin_BN = torch.from_numpy(np.minimum((uniform_BN * bins).astype(np.int64), bins - 1))
    weight_BN = weight_B.double().cpu()[:, None].expand_as(error_BN)
    for name, value_BN in (("bin_error", error_BN * weight_BN), ("bin_count", weight_BN)):
        sums.add(name, torch.zeros(bins, dtype=torch.float64).index_add(0, bin_BN.flatten(), value_BN.flatten()))


def _flow_error(
    model: Cola, config: RunConfig, z0_SBC: torch.Tensor, z1_SBC: torch.Tensor, time_BN: torch.Tensor
) -> torch.Tensor:
    """Squared error of the velocity at each position, (S, B)."""
    length, dit = config.latent_length, model.dit
    clean_length = length - config.model.dit.block_size
    t_SB = time_BN.repeat_interleave(length // time_BN.shape[1], dim=1).t()
    zt_SBC = flow_matching.noisy_latents(z0_SBC, z1_SBC, t_SB, torch.zeros_like(t_SB, dtype=torch.bool))
    velocity = dit(
        torch.cat((z0_SBC[:clean_length], zt_SBC)),
        two_copy_times(time_BN, length, clean_length, None),
        dit.two_copy_context(length, clean_length, None, z0_SBC.device),
    )
    return flow_matching.squared_error(velocity[clean_length:], z0_SBC, z1_SBC)


def _metrics(sums: dict[str, torch.Tensor], config: RunConfig) -> dict[str, float]:
    tokens, latents = sums["tokens"].item(), sums["latents"].item()
    metrics = {"reconstruction_nll": sums["nll"].item() / tokens}
    for t in ROBUSTNESS_TIMES:
        suffix = f"_t{round(1000 * t)}" if t else ""
        metrics[f"reconstruction_accuracy{suffix}"] = sums[f"correct_{t}"].item() / tokens
    if "variance" in sums:
        metrics["vae_logsnr"] = vae.measured_logsnr(sums["mean_square"].item(), sums["variance"].item())
    if "flow" in sums:
        metrics["flow_matching_loss"] = sums["flow"].item() / latents
        metrics["constant_predictor_loss"] = flow_matching.constant_predictor_loss(
            sums["target_sum"], sums["target_square"].item(), int(latents)
        )
        for index, (error, count) in enumerate(zip(sums["bin_error"], sums["bin_count"], strict=True)):
            if count:
                metrics[f"flow_matching_loss_bin_{index}"] = (error / count).item()
    return metrics
