"""`tools/bench_cost.py`: what it varies, and when it says that something grows too fast."""

import pytest

from cola_megatron.config import load_config
from tools.bench_cost import AXES, BASE, Point, config_at, figure, too_steep

BEFORE = Point("length", 64, seconds=1.0, flops=100.0, memory=100.0, planned=50.0)


@pytest.mark.parametrize("preset", ["tiny", "tiny-autoregressive", "tiny-masked-diffusion", "tiny-plaid"])
def test_a_point_differs_from_the_base_in_its_axis_alone(preset):
    base = load_config(preset, BASE)
    for name, axis in AXES.items():
        if axis.families and base.model.family not in axis.families:
            continue
        for value in axis.values:
            config = config_at(preset, name, value)
            assert name in ("batch", "ranks") or config.training.global_batch_size == base.training.global_batch_size
            assert name == "length" or config.data.sequence_length == base.data.sequence_length


def test_growth_beyond_theory_is_said_and_a_constant_at_the_start_is_not():
    as_planned = Point("length", 128, seconds=2.2, flops=200.0, memory=150.0, planned=100.0)
    assert too_steep(BEFORE, as_planned) == []
    quadratic = Point("length", 128, seconds=4.0, flops=200.0, memory=300.0, planned=100.0)
    time, memory = too_steep(BEFORE, quadratic)
    assert time == "time from 64 to 128 tokens of a sequence: 4.00 times, of which 2.00 were expected"
    assert memory.startswith("memory from 64 to 128")
    cheaper = Point("length", 128, seconds=1.05, flops=90.0, memory=105.0, planned=45.0)
    assert too_steep(BEFORE, cheaper) == []


def test_the_picture_has_a_column_for_each_axis():
    points = [BEFORE, Point("batch", 1, 1.0, 1.0, 1.0, 1.0), Point("batch", 2, 2.0, 2.0, 2.0, 2.0)]
    assert [panel.get_xlabel() for panel in figure(points).axes[2:]] == [AXES["length"].title, AXES["batch"].title]
