"""Runs megatron-core and DeepSpeed on a machine without CUDA, over gloo.

Both libraries reach for CUDA, or for a compiler, in places where the CPU would do. This is the only file that
knows; with CUDA present it changes nothing. What is replaced, and why:

* ``torch.cuda.current_device / synchronize / manual_seed / get_rng_state / set_rng_state``: megatron-core calls them
  unconditionally when it builds layers and when it recomputes activations; they are routed to the CPU generator.
* ``megatron.core.tensor_parallel.random._get/_set_cuda_rng_state``: the same, behind its own helpers.
* DeepSpeed's shared-memory collective is compiled at start-up (about 45 s) although gloo serves: it is declined.
"""

import importlib
import logging
import os
from typing import Any

import torch

# Modules that are written to, here and where importlib gives them: no checker can know what is put into them.
cuda: Any = torch.cuda


def use_cpu_where_there_is_no_cuda() -> None:
    """Prepares both libraries for a machine without CUDA; call it before either is imported. Idempotent."""
    if torch.cuda.is_available() or getattr(cuda, "_cola_cpu_backend", False):
        return
    cuda._cola_cpu_backend = True
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _route_cuda_calls_to_cpu()
    _decline_shared_memory_collective()


def _route_cuda_calls_to_cpu() -> None:
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed)) and None
    cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    # It warns on every recomputation that the CPU state changed: here that is what it is for.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _decline_shared_memory_collective() -> None:
    # importlib, because `import deepspeed.comm.torch as x` would bind torch itself.
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None
