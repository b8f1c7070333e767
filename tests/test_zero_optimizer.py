"""DeepSpeed is still the one that parallel/zero_optimizer.py was written against."""

import gc
import importlib
from importlib.metadata import version

import pytest
import torch

from cola_megatron.config import load_config
from cola_megatron.parallel import initialize_parallel
from cola_megatron.parallel.zero_optimizer import PRIVATE_PARTS, WRITTEN_AGAINST, DeepSpeedChanged, ZeroOptimizer
from cola_megatron.training.engine import Engine
from tests.ranks import run_ranks
from tools.gpu_setting import random_model
from tools.gpu_training import synthetic_batches


def test_the_installed_deepspeed_is_the_one_that_the_file_was_written_against():
    found = version("deepspeed")
    assert found == WRITTEN_AGAINST, (
        f"deepspeed {found}: read cola_megatron/parallel/zero_optimizer.py against it, run tests/test_layouts.py, "
        "test_checkpoint_layouts.py and test_divergence.py, then set WRITTEN_AGAINST"
    )


@pytest.mark.parametrize("module", PRIVATE_PARTS)
def test_deepspeed_has_the_private_parts_that_are_used(module):
    class_name, methods = PRIVATE_PARTS[module]
    optimizer = getattr(importlib.import_module(module), class_name)
    missing = [method for method in methods if not hasattr(optimizer, method)]
    assert not missing, f"deepspeed {version('deepspeed')}: {class_name} has no {', '.join(missing)}"


def test_an_optimiser_of_another_form_is_refused_with_the_version_to_install():
    class Engine:
        optimizer = object()

    with pytest.raises(DeepSpeedChanged, match=f"pip install deepspeed=={WRITTEN_AGAINST}"):
        ZeroOptimizer(Engine(), stage=1, offloaded=False, groups=None, networks={})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_engine_that_was_closed_leaves_no_memory_behind(stage):
    assert run_ranks(engine_that_is_closed, 1, stage) == [(True, 0)]


def engine_that_is_closed(stage: int) -> tuple[bool, int]:
    """Whether there were parameters while it lived, and how many are left."""
    shape = ("training.global_batch_size=2", "training.micro_batch_size=2", "data.sequence_length=32")
    config = load_config("tiny", ["stage=2", "training.precision=bf16", f"parallel.zero_stage={stage}", *shape])
    groups = initialize_parallel()

    def step_and_close() -> bool:
        engine = Engine(random_model(config, groups), config, groups)
        engine.step(synthetic_batches(config, 1, groups.device), 0)
        there = bool(parameters())
        engine.close()
        return there

    def parameters() -> list[torch.Tensor]:
        gc.collect()
        gc.collect()
        return [thing for thing in gc.get_objects() if isinstance(thing, torch.nn.Parameter)]

    return step_and_close(), len(parameters())
