"""The start of a large job: how many groups and communicators it makes, and what CUDA is told before it starts."""

import os
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cola_megatron import cuda_environment
from cola_megatron.cuda_environment import ALLOCATOR, ALLOCATOR_NEW_NAME, QUEUES, set_allocator, set_queues
from cola_megatron.parallel import groups as groups_module
from cola_megatron.parallel import initialize_parallel
from cola_megatron.preflight.check import Status
from cola_megatron.preflight.gpus import _environment
from launchers import agent, cli
from tests.ranks import run_ranks

RANKS, RANK = 1024, 5


def start(tensor: int, pipeline: int) -> dict[str, Any]:
    """One rank of a job of a thousand GPUs that nobody else is in: what it asks torch for."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(WORLD_SIZE=str(RANKS), RANK=str(RANK), LOCAL_RANK=str(RANK))
    calls, options, connected = [], {}, []
    join, new_group = dist.init_process_group, dist.new_group

    def fake_join(backend: str, **given: Any) -> None:
        options.update(given, backend=backend)
        join("fake", store=FakeStore(), rank=RANK, world_size=RANKS)

    def counted(ranks: Any = None, *arguments: Any, **given: Any) -> Any:
        calls.append((given.get("backend"), ranks is None or RANK in ranks))
        return new_group(ranks, *arguments, **given)

    dist.init_process_group, dist.new_group = fake_join, counted
    groups_module._local_device = lambda: torch.device("cuda", RANK)
    groups_module._connect = connected.append
    groups = initialize_parallel(tensor, pipeline_parallel_size=pipeline)
    return {
        "options": options,
        "connected": connected,
        "calls": len(calls),
        "member": sum(member for _, member in calls),
        "backends": Counter(backend for backend, _ in calls),
        "sizes": (groups.data_parallel_size, groups.tensor_parallel_size, groups.pipeline_parallel_size),
    }


@pytest.mark.parametrize(("tensor", "pipeline", "calls"), [(1, 1, 11_270), (8, 1, 5_999), (8, 4, 3_497)])
def test_a_thousand_ranks_hold_few_groups_and_connect_none_of_them(tensor: int, pipeline: int, calls: int) -> None:
    (found,) = run_ranks(start, 1, tensor, pipeline)
    assert found["sizes"] == (RANKS // tensor // pipeline, tensor, pipeline)
    # With a device bound, nccl would split a communicator off for each of the calls, on members and on the others.
    assert found["options"]["backend"] == "nccl" and "device_id" not in found["options"]
    assert found["connected"] == [torch.device("cuda", RANK)]
    # A group of gloo connects every rank with every other when it is made; one of nccl when it is first used.
    assert "gloo" not in found["backends"]
    assert found["member"] == 17
    # Most are of other ranks, and then a call costs tens of microseconds: torch wants all ranks to make them.
    assert found["calls"] <= calls


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (ALLOCATOR, ALLOCATOR_NEW_NAME, QUEUES):
        monkeypatch.setenv(name, "")  # so that the fixture removes afterwards what a test has set
        monkeypatch.delenv(name)


def test_the_allocator_grows_its_segments_unless_the_user_said_something(environment: None) -> None:
    set_allocator()
    assert os.environ[ALLOCATOR] == "expandable_segments:True"
    users = {ALLOCATOR: "max_split_size_mb:512"}
    set_allocator(users)
    assert users == {ALLOCATOR: "max_split_size_mb:512"}
    newer = {ALLOCATOR_NEW_NAME: "backend:cudaMallocAsync"}
    set_allocator(newer)
    assert newer == {ALLOCATOR_NEW_NAME: "backend:cudaMallocAsync"}


def test_one_queue_under_tensor_parallelism_unless_the_user_said_something() -> None:
    found: list[dict[str, str]] = [{}, {}, {QUEUES: "8"}]
    for size, values in zip((1, 2, 2), found, strict=True):
        set_queues(size, values)
    assert found == [{}, {QUEUES: "1"}, {QUEUES: "8"}]


def test_cola_sets_it_before_any_command_runs(environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    monkeypatch.setattr(cli, "app", lambda: seen.append(os.environ.get(ALLOCATOR)))
    cli.main()
    assert seen == ["expandable_segments:True"]


def test_who_starts_ranks_sets_it_for_them(environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def elastic_launch(config: Any, entry: str) -> Any:
        return lambda *arguments: seen.append(os.environ.get(ALLOCATOR))

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", elastic_launch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert agent.run_processes(["doctor"], 1, agent.Node(1, 0, "127.0.0.1:0", "job", 10)) == 0
    assert seen == ["expandable_segments:True"]


@pytest.mark.parametrize(
    ("values", "status", "said"),
    [
        ({ALLOCATOR: "expandable_segments:True"}, Status.OK, "set to 1 under tensor parallelism"),
        ({ALLOCATOR: "expandable_segments:True", QUEUES: "1"}, Status.OK, f"{QUEUES}=1"),
        ({ALLOCATOR: "expandable_segments:True", QUEUES: "8"}, Status.NOTE, f"wants {QUEUES}=1"),
        ({ALLOCATOR_NEW_NAME: "max_split_size_mb:512"}, Status.NOTE, f"{ALLOCATOR_NEW_NAME}=max_split_size_mb:512"),
        ({}, Status.NOTE, "lie free in pieces"),
    ],
)
def test_the_doctor_says_what_cuda_is_told(
    environment: None, monkeypatch: pytest.MonkeyPatch, values: dict[str, str], status: Status, said: str
) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    check = _environment()
    assert check.status is status and said in check.value + check.cure


def test_it_needs_no_torch() -> None:
    assert not hasattr(cuda_environment, "torch")
