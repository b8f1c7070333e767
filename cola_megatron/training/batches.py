"""Micro-batches with their random draws, as a function of their place in the run."""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from cola_megatron.config import ConfigError, RunConfig
from cola_megatron.data.samples import Sample
from cola_megatron.families.samples import training_sample


class Samples(Protocol):
    """An endless sequence of samples, such as `data.SampleSequence`."""

    padding_id: int
    end_of_text_id: int

    def read(self, start: int, count: int) -> Iterator[Sample]:
        """The samples at positions start ... start + count."""


class MicroBatch(NamedTuple):
    """What one forward pass of one replica takes."""

    tensors: dict[str, torch.Tensor]
    """The fields of `families.samples.training_sample`, stacked."""
    skipped: list[tuple[str, str]]
    """For each sample that was replaced: the shard it should have come from, and what is wrong with that."""


class MicroBatches(Dataset):
    """Item k is this rank's k-th micro-batch of the run, counted from step 0.

    Step s covers the global positions batch_of(s) * global_batch_size ...; micro-batch m of replica r takes the
    m * R + r-th slice of them. Tokens and draws depend on the position and the step alone, so neither the number of
    replicas nor the micro-batch size changes what a step sees.
    """

    def __init__(
        self,
        config: RunConfig,
        samples: Samples,
        replica: int,
        replicas: int,
        batch_of: Callable[[int], int] = lambda step: step,
    ):
        """
        Args:
            batch_of: number of the global batch that a step reads.
        """
        self.batch_of = batch_of
        self.config, self.samples = config, samples
        self.replica, self.replicas = replica, replicas
        self.per_step = micro_batches_per_step(config, replicas)

    def __len__(self) -> int:
        return self.config.training.steps * self.per_step

    def __getitem__(self, index: int) -> MicroBatch:
        step, micro_batch = divmod(index, self.per_step)
        training = self.config.training
        place = (micro_batch * self.replicas + self.replica) * training.micro_batch_size
        start = self.batch_of(step) * training.global_batch_size + place
        samples = list(self.samples.read(start, training.micro_batch_size))
        fields = [
            training_sample(
                self.config,
                sample.tokens,
                self.samples.padding_id,
                self.samples.end_of_text_id,
                sample_index=start + offset,
                step=step,
            )
            for offset, sample in enumerate(samples)
        ]
        return MicroBatch(
            {name: torch.from_numpy(np.stack([sample[name] for sample in fields])) for name in fields[0]},
            [sample.skipped for sample in samples if sample.skipped is not None],
        )


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
