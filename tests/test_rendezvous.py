"""A process's place in its job, where srun and not torchrun started it."""

import socket

import pytest

from cola_megatron.config import ConfigError
from cola_megatron.errors import ExitCode
from cola_megatron.parallel import initialize_parallel
from cola_megatron.parallel.rendezvous import place_from_srun, tasks_of_node
from tests.ranks import ends_of_ranks

TASK = {
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_PROCID": "17",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
}


def test_srun_tells_the_place() -> None:
    assert place_from_srun(TASK) == {"RANK": "17", "WORLD_SIZE": "20", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert place_from_srun({**TASK, "WORLD_SIZE": "2"}) == {}, "torchrun has told it"
    assert place_from_srun({**TASK, "SLURM_STEP_NUM_TASKS": "1"}) == {}, "a job of one"
    assert place_from_srun({"SLURM_NTASKS": "8"}) == {}, "in a batch script, outside of srun"


@pytest.mark.parametrize(
    ("written", "node", "tasks"), [("8", 0, 8), ("8(x4)", 3, 8), ("8,4(x2)", 2, 4), ("1,2,3", 1, 2)]
)
def test_tasks_of_a_node(written: str, node: int, tasks: int) -> None:
    assert tasks_of_node(written, node) == tasks


def test_tasks_of_a_node_in_another_form_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^8x4 is not how Slurm writes"):
        tasks_of_node("8x4", 0)


def test_tasks_without_an_address_are_refused() -> None:
    with pytest.raises(ConfigError, match="export MASTER_ADDR"):
        place_from_srun({key: value for key, value in TASK.items() if key != "MASTER_PORT"})


def join_at(port: int) -> None:
    import os

    os.environ["MASTER_PORT"] = str(port)
    initialize_parallel()


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        end = ends_of_ranks(join_at, 2, port, stopped=(1,), timeout=15)[0]
    assert end.exit_code == ExitCode.CRASHED
    assert end.last_line.startswith(f"cola: 127.0.0.1:{port}: the port is in use"), end.errors
