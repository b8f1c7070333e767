"""How the tests are dealt out to the workers of pytest-xdist (`make test JOBS=3`); docs/testing.md has the why."""

from pathlib import PurePath

import pytest
from xdist.scheduler import LoadScopeScheduling

# One Slurm serves all of these, so one worker runs them.
ON_SLURM = (
    *("test_slurm_survival", "test_slurm_arrays", "test_slurm_pipeline", "test_slurm_supervisor", "test_slurm_queue"),
    *("test_slurm_sites", "test_sweep_slurm"),
    "test_submit",
)
# Long files whose tests share nothing costly: each test goes to the worker that is free. Of other files one worker
# runs all tests, so that what a module prepares is prepared once.
DEALT_SINGLY = ("test_layouts", "test_training", "test_kills", "test_plan_memory", "test_peer_watch")
# What lasts longest begins first, or the other workers would wait for it at the end.
FIRST = (
    *ON_SLURM,
    *DEALT_SINGLY,
    *("test_data_kills", "test_gpu_check", "test_checkpoint_layouts", "test_checkpoint_async", "test_divergence"),
    *("test_packaging", "test_prep_slurm", "test_interchange_memory", "test_hangs", "test_doctor"),
)


class Dealing(LoadScopeScheduling):
    """Tests of one file stay together, but for `ON_SLURM` and `DEALT_SINGLY`."""

    def _split_scope(self, nodeid: str) -> str:
        file = _file(nodeid)
        if file in ON_SLURM:
            return "slurm"
        return nodeid if file in DEALT_SINGLY else file


def dealing(config: pytest.Config, log) -> Dealing | None:
    """The scheduler of `-n`; None where another way to distribute was asked for."""
    if config.getvalue("dist") != "load":
        return None
    config.option.loadscopereorder = False
    return Dealing(config, log)


def longest_first(items: list[pytest.Item]) -> None:
    """Puts the tests in the order in which workers take them; alike in every worker."""
    place = {file: number for number, file in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(_file(item.nodeid), len(place)))


def _file(nodeid: str) -> str:
    return PurePath(nodeid.split("::")[0]).stem
