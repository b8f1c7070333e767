"""Imported once by the fork server of `tests.ranks` and `tests.commands`."""

import gc
import os
from importlib import import_module

os.environ["OMP_NUM_THREADS"] = "1"

for module in (
    "cola_megatron.training.loop",
    "launchers.cli",
    # What every rank would otherwise import for its test's file, and DeepSpeed when it starts an engine. Muon's module
    # compiles functions, for which torch looks through itself.
    "tests.support",
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_config",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._subclasses.schema_check_mode",
    "torch.profiler._cupti_monitor",
):
    import_module(module)

# DeepSpeed collects garbage ten times while it starts; without this every rank would walk through, and copy, all that
# was imported here.
gc.collect()
gc.freeze()
