"""What several test files share: tiny configs, a prepared corpus, and real multi-process runs."""

import os

# One thread per process: the machine's cores are shared by the ranks of a test, and sums do not change order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

import gc
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest

from cola_megatron.config import RunConfig, load_config
from tests.slurm_cluster import Cluster, cluster
from tests.support import TINY, make_text, prepared


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    from tests.workers import dealing

    return dealing(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist
        from tests.workers import longest_first

        longest_first(items)


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """A child process that outlives its test may keep pytest from ending, long after its last line."""
    yield
    assert not multiprocessing.active_children()


@pytest.fixture(autouse=True, scope="module")
def nothing_to_collect_from_before() -> None:
    """DeepSpeed collects garbage ten times while it starts: seconds each, in a process that has run many tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder: a few hundred sequences of 32 tokens over a vocabulary of 300."""
    folder = tmp_path_factory.mktemp("corpus")
    text = folder / "text.jsonl"
    make_text(text, documents=120)
    return prepared(folder / "shards", [text])


@pytest.fixture
def tiny(corpus: Path, tmp_path: Path):
    """`tiny(stage=1, *overrides)`: a config whose steps take milliseconds, in a run folder of its own."""

    def build(stage: int = 2, *overrides: str) -> RunConfig:
        return load_config(
            "tiny",
            [*TINY, f"stage={stage}", f"data.path={corpus}", f"runs_folder={tmp_path / 'runs'}", *overrides],
        )

    return build


@pytest.fixture(scope="session")
def slurm_daemons() -> Iterator[Cluster]:
    with cluster(nodes=3) as running:
        yield running


@pytest.fixture
def slurm(slurm_daemons: Cluster) -> Cluster:
    """A real Slurm of three idle nodes, without jobs; skips the test where there is none on this machine."""
    slurm_daemons.clear()
    return slurm_daemons
