"""DeepSpeed is still the one that parallel/zero_optimizer.py was written against."""

import importlib
from importlib.metadata import version

import pytest

from cola_megatron.parallel.zero_optimizer import PRIVATE_PARTS, WRITTEN_AGAINST, DeepSpeedChanged, ZeroOptimizer


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
