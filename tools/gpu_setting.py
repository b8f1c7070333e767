"""What the GPU checks run on, and the records that they give."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from cola_megatron.config import RunConfig, load_config
from cola_megatron.families.cola.chain import Cola
from cola_megatron.models.pipelined import PipelinedModel
from cola_megatron.parallel import ProcessGroups, marks_of
from cola_megatron.planning.hardware import gpu_of_device
from cola_megatron.records.provenance import versions
from cola_megatron.training.build_model import build_model


@dataclass(frozen=True)
class Record:
    """One figure of one check."""

    name: str
    ok: bool
    value: float | None
    """None: not measured here, or the check failed before there was a figure."""
    unit: str
    detail: str


@dataclass(frozen=True)
class Setting:
    """What the checks run on, and at which size."""

    groups: ProcessGroups
    quick: bool

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.groups.device

    @property
    def on_gpu(self) -> bool:
        """Whether figures mean something: on the CPU only the logic of the checks is tested."""
        return self.device.type == "cuda"

    @property
    def preset(self) -> str:
        """Preset on which many short checks are made."""
        return "base" if self.on_gpu else "tiny"

    @property
    def large_preset(self) -> str:
        """Preset whose speed matters: the published model."""
        return "paper-2b" if self.on_gpu else "tiny"

    @property
    def peak_flops(self) -> float | None:
        """Dense bfloat16 FLOP/s of the device by its data sheet; None where it is not in the table."""
        gpu = gpu_of_device(machine(self.device.type))
        return None if gpu is None else gpu.bf16_flops

    def fits(self, needed: float) -> bool:
        """Whether so many bytes fit on the device, with 5% to spare for the allocator and for what kernels need."""
        return not self.on_gpu or needed <= 0.95 * torch.cuda.get_device_properties(self.device).total_memory

    def config(self, preset: str, *overrides: str) -> RunConfig:
        """A preset with a batch of a few micro-batches and no warm-up; on the CPU also with short sequences."""
        if self.on_gpu:
            micro_batch = load_config(preset).training.micro_batch_size
            shape = [f"training.global_batch_size={(2 if self.quick else 4) * micro_batch}"]
        else:
            shape = ["training.global_batch_size=4", "training.micro_batch_size=2", "data.sequence_length=32"]
        return load_config(preset, [*shape, "training.precision=bf16", "training.schedule.warmup_steps=0", *overrides])


Check = Callable[[Setting], Iterable[Record]]
"""Gives its records one by one, each as soon as it is measured."""


def software() -> dict[str, str]:
    """Versions of what decides the figures."""
    found = versions()
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def machine(device: str) -> str:
    """The device in a few words."""
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def synchronize(setting: Setting) -> None:
    """Waits for the device."""
    if setting.on_gpu:
        torch.cuda.synchronize(setting.device)


def seconds_of(setting: Setting, work: Callable[[], object], repeats: int, warm_up: int = 2) -> float:
    """Mean seconds of a piece of work, when the device has done it."""
    for _ in range(warm_up):
        work()
    synchronize(setting)
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(setting)
    return (time.perf_counter() - began) / repeats


def random_model(config: RunConfig, groups: ProcessGroups, spread: float = 0.0) -> PipelinedModel:
    """The model in float32 with starting weights that are drawn on its device: a CPU takes minutes for billions.

    In stage 2 of Cola DLM the reference is the encoder, as when training starts.

    Args:
        spread: standard deviation of normal noise that is added to every weight; at its start, with none, the gates of
            the DiT are zero and so is its velocity.
    """
    with groups.device:
        model = build_model(config, groups).to(groups.device)
    generator = torch.Generator(groups.device).manual_seed(config.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            marks_of(parameter).initializer(parameter.data, generator)
            if spread:
                parameter.add_(torch.empty_like(parameter).normal_(0.0, spread, generator=generator))
        # Of a pipeline one stage holds either or neither.
        if isinstance(model, Cola) and model.reference is not None and model.split is None:
            model.reference.load_state_dict(model.vae.encoder.state_dict())
    return model


def release_memory() -> None:
    """Gives back what no one refers to any more and counts the peak anew: checks must not see each other's memory."""
    if torch.cuda.is_available():
        gc.collect()
        gc.collect()  # parameters of an engine go in the second round, when torch has let go of them
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def reset_peak(setting: Setting) -> None:
    """Waits for the device and counts its peak anew."""
    synchronize(setting)
    if setting.on_gpu:
        torch.cuda.reset_peak_memory_stats(setting.device)


def peak_gib(setting: Setting) -> float | None:
    """The most that torch had allocated since then, in GiB; None on the CPU."""
    return torch.cuda.max_memory_allocated(setting.device) / 2**30 if setting.on_gpu else None


def forget_compiled() -> None:
    """Compiled graphs go, and what was cached of their making stays on the disk."""
    torch.compiler.reset()
