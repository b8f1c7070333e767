"""Compute accounting: the paper's nominal axis, and our count against torch's own counter."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from cola_megatron.families.cola.chain import Cola
from cola_megatron.parallel import initialize_parallel, initialize_parameters
from cola_megatron.planning.flops import paper_nominal_flops, training_flops, training_flops_per_sample
from tests.support import random_batch


@pytest.mark.parametrize(("steps", "exaflops"), [(10_000, 77.86), (15_000, 116.78), (250_000, 1_946)])
def test_nominal_axis_of_the_paper(steps, exaflops):
    assert paper_nominal_flops(1.8e9, steps * 1_408 * 512) / 1e18 == pytest.approx(exaflops, rel=5e-4)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_count_is_that_of_the_matrices_torch_runs(tiny, stage):
    config = tiny(stage)
    model = Cola(config, initialize_parallel())
    initialize_parameters(model, 0, initialize_parallel())
    with FlopCounterMode(display=False) as counter:
        model(random_batch(config, range(4)))["loss"].backward()
    # Torch does not count the CPU's fused attention, and we do; it is a few per cent at this size.
    assert counter.get_total_flops() == pytest.approx(4 * training_flops_per_sample(config), rel=0.1)


def test_frozen_steps_of_an_interval_cost_less(tiny):
    joint, interval = tiny(2), tiny(2, "training.vae_update.mode=interval", "training.vae_update.joint_steps=2")
    assert training_flops(interval, 2) == training_flops(joint, 2)
    assert training_flops(interval, 4) < training_flops(joint, 4)
