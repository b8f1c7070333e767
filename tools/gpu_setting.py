"""What the GPU checks run on, and the records that they give."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cola_megatron.config import RunConfig, load_config
from cola_megatron.parallel import ProcessGroups
from cola_megatron.records.provenance import versions


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
        """Preset whose model is measured."""
        return "base" if self.on_gpu else "tiny"

    def config(self, preset: str, *overrides: str) -> RunConfig:
        """A preset with a batch of a few micro-batches and no warm-up; on the CPU also with short sequences."""
        if self.on_gpu:
            micro_batch = load_config(preset).training.micro_batch_size
            shape = [f"training.global_batch_size={(2 if self.quick else 4) * micro_batch}"]
        else:
            shape = ["training.global_batch_size=4", "training.micro_batch_size=2", "data.sequence_length=32"]
        return load_config(preset, [*shape, "training.precision=bf16", "training.schedule.warmup_steps=0", *overrides])


Check = Callable[[Setting], list[Record]]


def software() -> dict[str, str]:
    """Versions of what decides the figures."""
    found = versions()
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def machine(setting: Setting) -> str:
    """The device in a few words."""
    return torch.cuda.get_device_name(setting.device) if setting.on_gpu else "CPU"


def synchronize(setting: Setting) -> None:
    """Waits for the device."""
    if setting.on_gpu:
        torch.cuda.synchronize(setting.device)


def release_memory() -> None:
    """Gives back what no one refers to any more and counts the peak anew: checks must not see each other's memory."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
