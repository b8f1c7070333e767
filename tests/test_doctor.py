"""`cola doctor`: what it finds on a machine, and between the nodes of a job."""

import json
import os
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cola_megatron.errors import ExitCode
from cola_megatron.parallel import initialize_parallel
from cola_megatron.preflight import Check, Status, cluster, installation, machine
from cola_megatron.preflight.cluster import Findings, check_cluster
from cola_megatron.preflight.gpus import FIELDS, gpu_checks, problems_of, read_query
from launchers.cli import app
from tests.commands import cola
from tests.ranks import run_ranks
from tests.support import package_in, small_disk

HEALTHY = {
    "index": "0",
    "name": "NVIDIA H100 80GB HBM3",
    "memory.total": "81559",
    "memory.used": "4",
    "ecc.errors.uncorrected.volatile.total": "0",
    "remapped_rows.pending": "No",
    "remapped_rows.failure": "No",
    "clocks.sm": "1980",
    "clocks.max.sm": "1980",
    "clocks_throttle_reasons.hw_thermal_slowdown": "Not Active",
    "clocks_throttle_reasons.hw_power_brake_slowdown": "Not Active",
    "temperature.gpu": "31",
    "driver_version": "570.86.15",
}


def answer(**changes: str) -> str:
    return ", ".join({**HEALTHY, **{key.replace("__", "."): value for key, value in changes.items()}}.values())


# ---- one machine ----------------------------------------------------------------------------------------------------


def test_this_machine(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["doctor", str(tmp_path / "runs"), "--json", "--report", str(tmp_path / "r.json")])
    assert done.exit_code == 0, done.output
    report = json.loads(done.output)
    assert report["ok"] and report == json.loads((tmp_path / "r.json").read_text())
    found = {check["name"]: check for check in report["checks"]}
    assert found["torch"]["value"] == version("torch")
    assert {"python", "deepspeed", "flash-attn", "NVIDIA apex", "disk speed", "shared memory"} <= found.keys()
    assert not (tmp_path / "runs").exists() and not list(tmp_path.glob(".doctor*"))


def test_versions_out_of_range_fail_with_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    known = installation._version
    monkeypatch.setattr(installation, "_version", lambda name: "2.3.0+cu121" if name == "torch" else known(name))
    found = {check.name: check for check in installation.installation_checks()}
    assert found["torch"].status is Status.FAILED and "<2.14,>=2.11" in found["torch"].cure
    assert found["numpy"].status is Status.OK


def test_the_unrelated_apex_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    with package_in(tmp_path, "apex", monkeypatch):
        found = {check.name: check for check in installation.installation_checks()}
    assert found["NVIDIA apex"].status is Status.WARNING and "not NVIDIA's" in found["NVIDIA apex"].cure


def test_a_full_disk_is_a_failed_check(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        found = {check.name: check for check in machine.machine_checks(disk / "runs")}
    assert found["disk"].status is Status.FAILED and "No space left" in found["disk"].value
    assert found["disk space"].status is Status.WARNING


# ---- GPUs -----------------------------------------------------------------------------------------------------------


def test_a_healthy_gpu_has_no_problems() -> None:
    (row,) = read_query(answer())
    assert row == HEALTHY and list(problems_of(row)) == []


@pytest.mark.parametrize(
    ("change", "said", "status"),
    [
        ({"memory__used": "40000"}, "in use by another process", Status.FAILED),
        ({"ecc__errors__uncorrected__volatile__total": "3"}, "3 uncorrected memory errors", Status.FAILED),
        ({"remapped_rows__pending": "Yes"}, "wait to be remapped", Status.WARNING),
        ({"clocks_throttle_reasons__hw_thermal_slowdown": "Active", "temperature__gpu": "94"}, "94 C", Status.FAILED),
    ],
)
def test_a_sick_gpu(change: dict[str, str], said: str, status: Status) -> None:
    (row,) = read_query(answer(**change))
    ((found, what, cure),) = problems_of(row)
    assert found is status and said in what and cure


def test_what_a_gpu_does_not_know_is_no_problem() -> None:
    unknown = {field.replace(".", "__"): "[N/A]" for field in FIELDS if field not in ("index", "name")}
    (row,) = read_query(answer(**unknown))
    assert list(problems_of(row)) == []


@pytest.mark.parametrize(
    ("script", "said"),
    [("exit 0", None), ("echo 'Unable to determine the device handle'; exit 15", "Unable to determine")],
)
def test_a_driver_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str | None) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (check,) = gpu_checks()
    assert check.status is Status.FAILED
    assert said is None or said in check.value


# ---- the nodes of a job ---------------------------------------------------------------------------------------------


def look(rank_of_fault: int, fault: str) -> Findings | None:
    """Three ranks on three nodes, of which one has a fault."""
    groups = initialize_parallel()
    os.environ["SLURMD_NODENAME"] = f"n{groups.rank}"
    faulty, product, local = groups.rank == rank_of_fault, lambda device: 1e12, [Check("disk", Status.OK, "fast")]
    if faulty and fault == "slow":
        product = lambda device: 0.4e12  # noqa: E731
    if faulty and fault == "old":
        cluster.versions = lambda: {"torch": "2.11.0"}
    elif fault == "old":
        cluster.versions = lambda: {"torch": "2.13.0"}
    if faulty and fault == "clock":
        now = time.time
        cluster.time = type("Clock", (), {"time": lambda: now() + 60, "perf_counter": time.perf_counter})
    if fault == "everywhere" or (faulty and fault == "disk"):
        local = [Check("disk", Status.FAILED, "read-only")]
    return check_cluster(groups, local, strict=True, matrix_product=product)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("slow", "matrix product 40% of the median"), ("old", "torch 2.11.0 instead of 2.13.0"), ("disk", "read-only")],
)
def test_a_faulty_node_is_named(fault: str, reason: str) -> None:
    findings = run_ranks(look, 3, 1, fault)[0]
    assert findings.bad_nodes.keys() == {"n1"} and reason in findings.bad_nodes["n1"][0]
    assert any(check.status is Status.FAILED for check in findings.checks)


def test_a_clock_that_is_wrong_is_named() -> None:
    findings = run_ranks(look, 3, 2, "clock")[0]
    assert findings.bad_nodes.keys() == {"n2"} and "+60" in findings.bad_nodes["n2"][0]


def test_what_fails_everywhere_is_no_nodes_fault() -> None:
    findings = run_ranks(look, 3, 0, "everywhere")[0]
    assert findings.bad_nodes == {} and sum(check.status is Status.FAILED for check in findings.checks) == 3


def test_good_nodes() -> None:
    findings, *others = run_ranks(look, 3, 0, "none")
    assert findings.bad_nodes == {} and others == [None, None]
    assert all(check.status is Status.OK for check in findings.checks)


def test_it_never_waits_for_ever() -> None:
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = cola("doctor", "--timeout", 4, env=environment)
    assert done.returncode == ExitCode.CRASHED
    assert "no end within 4 s at: rendezvous" in done.stderr or "did not meet" in done.stderr
