"""What CUDA and torch's allocator read from the environment, once, before they start. Importing this imports no torch.

Whoever starts ranks sets it for them, and the `cola` command for itself. A value that the user gave always stays.
"""

import os
from collections.abc import MutableMapping

ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
ALLOCATOR_NEW_NAME = "PYTORCH_ALLOC_CONF"
"""torch reads this one first."""
QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"


def set_allocator(environment: MutableMapping[str, str] = os.environ) -> None:
    """Segments that grow: without them the largest layouts run out of memory that lies free in pieces."""
    if ALLOCATOR_NEW_NAME not in environment:
        environment.setdefault(ALLOCATOR, "expandable_segments:True")


def set_queues(tensor_parallel_size: int, environment: MutableMapping[str, str] = os.environ) -> None:
    """Under tensor parallelism one hardware queue, which keeps collectives and kernels in the order of their launch.

    megatron-core's overlap relies on it. Elsewhere it would keep ZeRO's traffic from running beside the computation.
    """
    if tensor_parallel_size > 1:
        environment.setdefault(QUEUES, "1")
