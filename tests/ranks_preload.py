"""Imported once by the fork server of `tests.ranks` and `tests.commands`."""

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed  # noqa: F401

import cola_megatron.training.loop  # noqa: F401
import launchers.cli  # noqa: F401

# DeepSpeed collects garbage ten times while it starts; without this every rank would walk through, and copy, all that
# was imported here.
gc.collect()
gc.freeze()
