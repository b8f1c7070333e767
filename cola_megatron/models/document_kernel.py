"""Whether a run's attention inside documents has a kernel of its own."""

import torch

from cola_megatron.config import ConfigError, TrainingConfig
from cola_megatron.layers.packed_documents import Kernel, kernel_of_variable_lengths


def document_kernel(training: TrainingConfig, device: torch.device) -> Kernel | None:
    """What computes attention inside documents; None: products of all pairs under a mask.

    Raises:
        ConfigError: the run asks for a kernel that cannot run here.
    """
    if training.document_kernel == "never":
        return None
    dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32
    kernel = kernel_of_variable_lengths(device, dtype)
    if kernel is None and training.document_kernel == "always":
        raise ConfigError(
            "training.document_kernel=always needs training.precision=bf16 and a GPU of compute capability 8.0 on, "
            f"not {training.precision} on {device.type}; auto takes it where it can be had"
        )
    return kernel
