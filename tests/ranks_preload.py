"""Imported once by the fork server of `tests.ranks`."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed  # noqa: F401

import cola_megatron.training.loop  # noqa: F401
