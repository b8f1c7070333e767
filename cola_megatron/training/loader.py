"""Micro-batches prepared ahead of their step, and what waiting for them and replacing bad samples came to."""

import logging
import time
from collections.abc import Collection, Generator, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from cola_megatron.data import ShardError
from cola_megatron.errors import UserError
from cola_megatron.parallel import ProcessGroups
from cola_megatron.training.batches import MicroBatch, MicroBatches
from cola_megatron.training.stop_signals import leave_stopping_to_the_main_process

logger = logging.getLogger(__name__)


class BatchLoader(Iterator[dict[str, torch.Tensor]]):
    """The tensors of the micro-batches from one step to the end of the run, on the device.

    `training.loader_workers` processes prepare them, each `training.prefetch_steps` steps ahead. `close` ends them:
    they ignore the signals that stop a run, so nothing else would, and a process that leaves waits for its children.
    """

    def __init__(self, batches: MicroBatches, start_step: int, groups: ProcessGroups, known_bad: Collection[str] = ()):
        """
        Args:
            known_bad: shards that have been warned of.
        """
        training = batches.config.training
        workers = training.loader_workers
        self._batches, self._groups = batches, groups
        self._waited, self._delivered = 0.0, 0
        self._skipped, self._named = 0, set(known_bad)
        self._bad_shards: dict[str, str] = {}
        loader = DataLoader(
            _ErrorsAsItems(batches),
            batch_size=None,
            sampler=range(start_step * batches.per_step, len(batches)),
            num_workers=workers,
            prefetch_factor=max(2, training.prefetch_steps * batches.per_step) if workers else None,
            pin_memory=groups.device.type == "cuda",
            worker_init_fn=leave_stopping_to_the_main_process,
            # Not by a fork server (the default from Python 3.14 on, and where this process came from one): it would
            # die of a signal to the process group, and its workers would count as dead.
            multiprocessing_context="fork" if workers else None,
        )
        self._items = _items(loader)

    def close(self) -> None:
        """Ends the loader's processes."""
        self._items.close()

    def __next__(self) -> dict[str, torch.Tensor]:
        """Raises ShardError (and other user errors) of the workers as they were, and one when a worker died."""
        began = time.perf_counter()
        try:
            item = next(self._items)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                "a loader worker died: it was killed, or the machine ran out of memory; lower training.loader_workers "
                "or training.prefetch_steps, and run again"
            ) from error
        self._waited += time.perf_counter() - began
        if isinstance(item, UserError):
            raise item
        self._delivered += 1
        self._skipped += len(item.skipped)
        self._bad_shards.update(item.skipped)
        return {name: tensor.to(self._groups.device, non_blocking=True) for name, tensor in item.tensors.items()}

    def measured(self) -> dict[str, float]:
        """What the steps since the last call took; alike on every rank, which all call it.

        Returns:
            `data/wait`: seconds per step that the slowest rank waited for data. Where bad shards are skipped, also
            `data/skipped_samples`: samples of the whole job that were replaced.

        Raises:
            ShardError: ranks of one replica replaced different samples, so they do not see the same files.
        """
        groups, steps = self._groups, max(1, self._delivered / self._batches.per_step)
        mine = torch.tensor([groups.data_parallel_rank, self._waited / steps, self._skipped], dtype=torch.float64)
        ranks = torch.zeros(groups.world_size, 3, dtype=torch.float64, device=groups.device)
        ranks[groups.rank] = mine.to(groups.device)
        if groups.world_size > 1:
            dist.all_reduce(ranks)
        self._waited, self._delivered, self._skipped = 0.0, 0, 0
        replicas, waited, skipped = ranks.cpu().unbind(1)
        found = {"data/wait": waited.max().item()}
        if self._batches.config.data.bad_shards == "skip":
            by_replica = dict(zip(replicas.tolist(), skipped.tolist(), strict=True))
            if any(by_replica[rank] != count for rank, count in zip(replicas.tolist(), skipped.tolist(), strict=True)):
                raise ShardError(
                    "ranks of one replica could not read different samples, so they train on different data: see that "
                    "every node has the same shards, then resume from the last checkpoint"
                )
            found["data/skipped_samples"] = sum(by_replica.values())
            if found["data/skipped_samples"]:
                self._warn_of_bad_shards()
        return found

    def _warn_of_bad_shards(self) -> None:
        """Names each shard once in the output of the job; all ranks call it."""
        of_ranks: list[dict[str, str]] = [{}] * self._groups.world_size
        dist.all_gather_object(of_ranks, self._bad_shards)
        for shard, problem in {shard: problem for bad in of_ranks for shard, problem in bad.items()}.items():
            if shard not in self._named and self._groups.is_main:
                logger.warning("%s; its samples are replaced by others (data.bad_shards=skip)", problem)
            self._named.add(shard)


def _items(loader: DataLoader) -> Generator[MicroBatch | UserError, None, None]:
    """The items of a loader, whose processes start with the first request and end with the last or a `close`."""
    iterator: Any = iter(loader)  # torch does not tell what kind it is: one with processes, or one without
    try:
        yield from iterator
    finally:
        if loader.num_workers:
            # Torch does this when the iterator is collected, which the traceback of an error may put off for ever.
            iterator._shutdown_workers()


class _ErrorsAsItems(Dataset):
    """Torch would wrap an error of a worker in its traceback: one for people travels as an item instead."""

    def __init__(self, batches: MicroBatches):
        self.batches = batches

    def __getitem__(self, index: int) -> MicroBatch | UserError:
        try:
            return self.batches[index]
        except UserError as error:
            return error
