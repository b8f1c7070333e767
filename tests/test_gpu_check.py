"""The checks for GPU machines: that they run, that they can fail, and what the command answers."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cola_megatron.parallel import initialize_parallel, initialize_parameters
from cola_megatron.scaling.hardware import gpu_of_device
from tools import gpu_check, gpu_checks, gpu_parity, gpu_training
from tools.gpu_setting import Record, Setting

ROOT = Path(__file__).resolve().parents[1]
ABOUT = {"date": "2026-01-02", "machine": "a GPU", "versions": {"torch": "2.13.0", "numpy": "2"}, "command": "python"}


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting(initialize_parallel(), quick=True)


def command(*options: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, on a machine without a GPU or with its GPU hidden."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "tools.gpu_check", *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_every_check_runs_on_the_cpu():
    answer = command("--quick", "--device", "cpu", "--json")
    assert answer.returncode == 0, answer.stderr
    document = json.loads(answer.stdout)
    assert document["machine"] == "CPU" and document["versions"]["torch"] == torch.__version__
    records = {record["name"]: record for record in document["records"]}
    assert all(record["ok"] for record in records.values())
    for name in gpu_checks.all_checks(quick=True):
        assert any(found.startswith(name) for found in records), name
    for name in ("train.stage2.zero3.speed", "generate.batch16"):
        assert math.isfinite(records[name]["value"]) and records[name]["value"] > 0
    assert records["resume.zero1"]["value"] == 0.0
    # There is no peak to compare with, and no memory of a device to measure.
    assert records["train.stage1.zero1.utilisation"]["value"] is None
    assert records["train.stage1.zero1.memory"]["value"] is None


def test_without_cuda_it_says_so_in_one_line():
    answer = command("--quick")
    assert answer.returncode == 1 and answer.stdout == ""
    assert answer.stderr.count("\n") == 1 and "no CUDA device" in answer.stderr and "--device cpu" in answer.stderr


@pytest.fixture
def two_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(setting: Setting) -> list[Record]:
        raise ValueError("first line\nthe last line")

    def working(setting: Setting) -> list[Record]:
        print("a library talks")
        return [Record("working", True, 2.0, "apples", "fine")]

    monkeypatch.setattr(gpu_checks, "all_checks", lambda quick=False: {"broken": broken, "working": working})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def test_a_failed_check_does_not_stop_the_others(two_checks, capsys):
    assert gpu_check.main(["--device", "cpu", "--json"]) == 1
    output = capsys.readouterr()
    records = json.loads(output.out)["records"]
    assert [(record["name"], record["ok"], record["detail"]) for record in records] == [
        ("broken", False, "the last line"),
        ("working", True, "fine"),
    ]
    assert "FAILED broken" in output.err and "1 of 2 passed" in output.err and "a library talks" in output.err


def test_only_runs_what_was_asked_for_and_gives_rows_for_the_page(two_checks, capsys):
    assert gpu_check.main(["--device", "cpu", "--only", "work", "--markdown"]) == 0
    (row,) = capsys.readouterr().out.splitlines()
    assert row.startswith("| ") and row.endswith("| working: 2 apples |")


def test_an_unknown_check_is_wrong_use(two_checks, capsys):
    assert gpu_check.main(["--device", "cpu", "--only", "speed"]) == 2
    assert "there are broken, working" in capsys.readouterr().err


def test_a_row_has_the_columns_of_the_page():
    row = gpu_check.markdown_row(Record("train", True, 12345.678, "tokens/s", "detail"), ABOUT)
    assert row == "| 2026-01-02 | a GPU | torch 2.13.0 | `python` | train: 12,346 tokens/s |"
    header = next(line for line in (ROOT / "docs" / "gpu.md").read_text().splitlines() if line.startswith("| date"))
    assert header.count("|") == row.count("|")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("CPU", None),
    ],
)
def test_the_peak_of_a_device_by_its_name(name, peak):
    gpu = gpu_of_device(name)
    assert (gpu and gpu.bf16_flops) == peak


@pytest.mark.parametrize(("check", "error"), [("check_golden_fp32", 1e-4), ("check_golden_bf16", 0.1)])
def test_parity_fails_when_the_numbers_are_off(setting, monkeypatch, check, error):
    right = gpu_parity.golden_outputs

    def slightly_wrong(model, golden):
        return {name: (1 + error) * tensor for name, tensor in right(model, golden).items()}

    monkeypatch.setattr(gpu_parity, "golden_outputs", slightly_wrong)
    (record,) = getattr(gpu_parity, check)(setting)
    assert not record.ok and record.value == pytest.approx(error, rel=0.3)


def test_resuming_fails_when_the_state_is_not_restored(setting, monkeypatch):
    monkeypatch.setattr(
        gpu_training, "load_weights", lambda model, checkpoint, groups: initialize_parameters(model, 1, groups)
    )
    (record,) = gpu_training.check_resume(setting, zero_stage=1)
    assert not record.ok and record.value > 0
    assert "two uninterrupted runs differ by 0.0e+00" in record.detail
    assert not torch.are_deterministic_algorithms_enabled()
