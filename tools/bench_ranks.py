"""Runs a config in real processes on this machine and brings back what each of them measured.

Over gloo ranks are forked from a server that has imported the heavy libraries once; over nccl, with one GPU for each
rank, every process starts from nothing, because a forked process may not use CUDA.
"""

import contextlib
import json
import multiprocessing
import os
import socket
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing

from cola_megatron.config import RunConfig
from cola_megatron.data.samples import Sample
from cola_megatron.parallel import initialize_parameters
from cola_megatron.training.batches import MicroBatches
from cola_megatron.training.build_model import build_model, initialize_run

_SAMPLES = 4096
"""Random sequences that the batches are drawn from."""


@dataclass(frozen=True)
class Sent:
    """What one rank sent in one step in transfers of one sort; see `communication_counter`."""

    kind: str
    operation: str
    dtype: str
    calls: int
    payload: float
    """Bytes handed over."""
    wire: float
    """Bytes sent by a ring."""


@dataclass(frozen=True)
class RankResult:
    """What one rank measured."""

    rank: int
    stage: int
    """Of the pipeline."""
    seconds: list[float]
    """Of each timed step, from a barrier to the end of the step."""
    processor_seconds: list[float]
    """Of all threads of the rank in each timed step: waiting asleep is not in it, nor what other programs do."""
    sent: list[Sent]
    """In one step of its own, which is not timed."""
    loss: float
    """Of the first step, over the global batch."""
    peak_bytes: float = 0.0
    """What the steps added to the memory that the rank had before them, at its largest: on a CPU of the process, on
    CUDA of what torch allocated."""


class RandomSamples:
    """Random tokens in the place of those of prepared shards."""

    padding_id = end_of_text_id = -1

    def __init__(self, config: RunConfig):
        self.vocab_size, self.length = config.model.vocab_size, config.data.sequence_length

    def read(self, start: int, count: int) -> Iterator[Sample]:
        """The samples at positions start ... start + count."""
        for position in range(start, start + count):
            yield Sample(np.random.default_rng(position % _SAMPLES).integers(0, self.vocab_size, self.length), None)


def run_ranks(config: RunConfig, ranks: int, warm_up: int, steps: int) -> list[RankResult]:
    """Runs `warm_up` + 1 + `steps` optimiser steps of the config in a job of `ranks` processes on this machine.

    Raises:
        torch.multiprocessing.spawn.ProcessException: a rank failed; the message holds its traceback.
    """
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    multiprocessing.get_context("forkserver").set_forkserver_preload(["cola_megatron.training.loop", "deepspeed"])
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks share the cores
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, _free_port(), Path(folder), config, warm_up, steps)
        torch.multiprocessing.start_processes(_rank, arguments, nprocs=ranks, start_method=method)
        return [_read(Path(folder) / f"{rank}.json") for rank in range(ranks)]


def _rank(rank: int, ranks: int, port: int, folder: Path, config: RunConfig, warm_up: int, steps: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    with (folder / f"{rank}.log").open("w") as log, contextlib.redirect_stdout(log), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = measure(config, warm_up, steps)
    (folder / f"{rank}.json").write_text(json.dumps(asdict(result)))
    dist.barrier()
    dist.destroy_process_group()


def measure(config: RunConfig, warm_up: int, steps: int) -> RankResult:
    """This rank's part: steps to warm up, one to count what is sent, then the timed ones."""
    from cola_megatron.training.engine import Engine
    from tools.communication_counter import CommunicationCounter

    groups = initialize_run(config)
    model = build_model(config, groups)
    initialize_parameters(model, config.seed, groups)
    engine = Engine(model.to(groups.device), config, groups)
    samples = MicroBatches(config, RandomSamples(config), groups.data_parallel_rank, groups.data_parallel_size)
    losses, seconds, processor_seconds, counter = [], [], [], CommunicationCounter(groups)
    peak = PeakMemory(groups.device)
    for step in range(warm_up + 1 + steps):
        first = step * samples.per_step
        batches = [_on_device(samples[first + index].tensors, groups.device) for index in range(samples.per_step)]
        groups.barrier()
        began, processor_began = time.perf_counter(), time.process_time()
        with counter if step == warm_up else contextlib.nullcontext():
            losses.append(engine.step(iter(batches), step)["loss"])
        if groups.device.type == "cuda":
            torch.cuda.synchronize()
        if step > warm_up:
            seconds.append(time.perf_counter() - began)
            processor_seconds.append(time.process_time() - processor_began)
    sent = [Sent(*transfer, **asdict(amount)) for transfer, amount in sorted(counter.sent.items())]
    return RankResult(
        groups.rank, groups.pipeline_parallel_rank, seconds, processor_seconds, sent, losses[0], peak.bytes()
    )


class PeakMemory:
    """The largest memory since it was made, beyond what there was then."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = float(torch.cuda.memory_allocated(device))
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak begins anew (man 5 proc)
            self.before = _status("VmRSS")

    def bytes(self) -> float:
        """So far."""
        now = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _status("VmHWM")
        return now - self.before


def _status(name: str) -> float:
    """A size in bytes that Linux keeps for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _on_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _read(path: Path) -> RankResult:
    found: dict[str, Any] = json.loads(path.read_text())
    return RankResult(**{**found, "sent": [Sent(**sent) for sent in found["sent"]]})


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
