"""Micro-batches with their random draws, as a function of their place in the run."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cola_megatron.config import ConfigError, RunConfig
from cola_megatron.data import GlobalOrder, TokenShards
from cola_megatron.objectives.randomness import sample_draws
from cola_megatron.training.stop_signals import leave_stopping_to_the_main_process


class MicroBatches(Dataset):
    """Item k is this rank's k-th micro-batch of the run, counted from step 0.

    Step s covers the global positions s * global_batch_size ...; micro-batch m of replica r takes the m * R + r-th
    slice of them. Tokens and draws depend on the position and the step alone, so neither the number of replicas nor
    the micro-batch size changes what a step sees.
    """

    def __init__(self, config: RunConfig, shards: TokenShards, replica: int, replicas: int):
        self.config, self.shards = config, shards
        self.replica, self.replicas = replica, replicas
        self.order = GlobalOrder(len(shards), config.data.seed)
        self.per_step = micro_batches_per_step(config, replicas)

    def __len__(self) -> int:
        return self.config.training.steps * self.per_step

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`tokens` (B, L) and the stacked draws."""
        step, micro_batch = divmod(index, self.per_step)
        training = self.config.training
        start = (
            step * training.global_batch_size + (micro_batch * self.replicas + self.replica) * training.micro_batch_size
        )
        return collate(self.config, self.shards, self.order, start, training.micro_batch_size, step)


def collate(
    config: RunConfig, shards: TokenShards, order: GlobalOrder, start: int, count: int, step: int
) -> dict[str, torch.Tensor]:
    """The samples at global positions start ... start + count with their draws for this step."""
    samples = [
        {"tokens": shards[int(sample)], **sample_draws(config, start + offset, step)}
        for offset, sample in enumerate(order.sample_ids(start, count))
    ]
    return {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}


def micro_batches_per_step(config: RunConfig, replicas: int) -> int:
    """Gradient accumulation steps.

    Raises:
        ConfigError: the global batch cannot be cut evenly.
    """
    training = config.training
    steps, rest = divmod(training.global_batch_size, training.micro_batch_size * replicas)
    if rest:
        raise ConfigError(
            f"training.global_batch_size={training.global_batch_size} must be divisible by training.micro_batch_size="
            f"{training.micro_batch_size} times the {replicas} data-parallel replicas"
        )
    return steps


def micro_batch_loader(
    batches: MicroBatches, start_step: int, device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches from `start_step` to the end of the run, prepared ahead by worker processes, on the device."""
    workers = batches.config.training.loader_workers
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(start_step * batches.per_step, len(batches)),
        num_workers=workers,
        prefetch_factor=max(2, 2 * batches.per_step) if workers else None,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_stopping_to_the_main_process,
    )
    for batch in loader:
        yield {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
