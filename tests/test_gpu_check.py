"""The checks for GPU machines: that they run, that they can fail, and what the command answers."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cola_megatron.config import load_config
from cola_megatron.parallel import initialize_parallel, initialize_parameters
from cola_megatron.planning.hardware import gpu_of_device
from tools import (
    gpu_ceilings,
    gpu_check,
    gpu_checkpoint,
    gpu_checks,
    gpu_generation,
    gpu_log,
    gpu_parity,
    gpu_step,
    gpu_training,
)
from tools.gpu_setting import Record, Setting, random_model

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


def test_every_check_runs_on_the_cpu(tmp_path):
    answer = command("--quick", "--device", "cpu", "--json", "--output", str(tmp_path / "check.jsonl"))
    assert answer.returncode == 0, answer.stderr
    document = json.loads(answer.stdout)
    assert document["machine"] == "CPU" and torch.__version__.startswith(document["versions"]["torch"])
    records = {record["name"]: record for record in document["records"]}
    assert all(record["ok"] for record in records.values())
    for name in gpu_checks.all_checks(quick=True):
        assert any(found.startswith(name) for found in records), name
    assert list(document["seconds"]) == list(gpu_checks.all_checks(quick=True))
    log = gpu_log.read_log(tmp_path / "check.jsonl")
    assert log.ended and [record.name for record in log.records] == list(records)
    measured = ("train.stage2.zero3.speed", "generate.batch64", "step.paper-2b.micro1.step", "checkpoint.synchronous")
    for name in measured:
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
def some_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(setting: Setting) -> list[Record]:
        raise ValueError("first line\nthe last line")

    def working(setting: Setting) -> list[Record]:
        print("a library talks")
        return [Record("working", True, 2.0, "apples", "fine")]

    def breaks_later(setting: Setting) -> Iterator[Record]:
        yield Record("half.one", True, 1.0, "apples", "")
        raise ValueError("the second half")

    checks = {"broken": broken, "working": working, "half": breaks_later}
    monkeypatch.setattr(gpu_checks, "all_checks", lambda quick=False: checks)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def test_a_failed_check_does_not_stop_the_others(some_checks, capsys):
    assert gpu_check.main(["--device", "cpu", "--json"]) == 1
    output = capsys.readouterr()
    records = json.loads(output.out)["records"]
    assert [(record["name"], record["ok"], record["detail"]) for record in records] == [
        ("broken", False, "the last line"),
        ("working", True, "fine"),
        ("half.one", True, ""),
        ("half", False, "ValueError: the second half"),
    ]
    assert "FAILED broken" in output.err and "2 of 4 passed" in output.err and "a library talks" in output.err


def test_only_runs_what_was_asked_for_and_gives_rows_for_the_page(some_checks, capsys):
    assert gpu_check.main(["--device", "cpu", "--only", "work", "--markdown"]) == 0
    (row,) = capsys.readouterr().out.splitlines()
    assert row.startswith("| ") and row.endswith("| working: 2 apples |")


def test_an_unknown_check_is_wrong_use(some_checks, capsys):
    assert gpu_check.main(["--device", "cpu", "--only", "speed"]) == 2
    assert "there are broken, working, half" in capsys.readouterr().err


def test_the_names_of_the_checks_are_listed(some_checks, capsys):
    assert gpu_check.main(["--list", "--only", "wor"]) == 0
    assert capsys.readouterr().out == "working\n"


def test_each_figure_is_in_the_file_before_the_next_check_begins(some_checks, tmp_path, monkeypatch):
    path, seen = tmp_path / "check.jsonl", []

    def looks(setting: Setting) -> Iterator[Record]:
        for number in range(2):
            seen.append([record.name for record in gpu_log.read_log(path).records])
            yield Record(f"looks.{number}", True, 1.0, "", "")
        seen.append([record.name for record in gpu_log.read_log(path).records])

    monkeypatch.setattr(gpu_checks, "all_checks", lambda quick=False: {"looks": looks})
    assert gpu_check.main(["--device", "cpu", "--output", str(path)]) == 0
    assert seen == [[], ["looks.0"], ["looks.0", "looks.1"]]


def test_a_run_that_was_cut_off_is_told_from_one_that_ended_and_loses_nothing(some_checks, tmp_path, capsys):
    path = tmp_path / "check.jsonl"
    assert gpu_check.main(["--device", "cpu", "--only", "work", "--output", str(path)]) == 0
    first, *_, last = whole = path.read_text().splitlines()
    about = json.loads(first)
    assert about["kind"] == "begin" and {"date", "machine", "versions", "command"} <= about.keys()
    assert json.loads(last)["kind"] == "end"
    assert gpu_check.main(["--rows", str(path)]) == 0
    capsys.readouterr()
    # A process that is killed may leave half a line.
    path.write_text("\n".join(whole[:2]) + '\n{"kind": "rec')
    assert gpu_check.main(["--rows", str(path)]) == 0
    output = capsys.readouterr()
    assert output.out.splitlines()[-1].endswith("| working: 2 apples |") and "was cut off" in output.err


@pytest.mark.parametrize("content", ["", "a text\n", '{"kind": "record"}\n', '{"kind": "begin"}\nhalf\n{}\n'])
def test_rows_of_another_file_are_refused_in_one_line(tmp_path, capsys, content):
    path = tmp_path / "other.jsonl"
    path.write_text(content)
    assert gpu_check.main(["--rows", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_row_has_the_columns_of_the_page():
    row = gpu_log.markdown_row(Record("train", True, 12345.678, "tokens/s", "detail"), ABOUT)
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


def test_each_switch_is_one_that_the_config_of_the_step_has_on(setting):
    names, base = gpu_checks.all_checks(), load_config("paper-2b")
    for name, overrides in gpu_step.SWITCHES.items():
        assert f"step.paper-2b.{name}" in names
        assert load_config("paper-2b", list(overrides)) != base


def test_the_step_is_measured_at_every_size_on_one_engine(setting):
    overrides = ("training.activation_checkpointing=true",)
    records = {record.name: record for record in gpu_step.check_step(setting, "step", overrides, sweep=True)}
    assert all(record.ok for record in records.values())
    assert records["step.micro2.step"].value > records["step.micro2.forward_backward"].value > 0
    assert {name.split(".")[1] for name in records} == {"micro1", "micro2"}


def test_a_size_that_the_plan_says_does_not_fit_is_left_out(setting, monkeypatch):
    monkeypatch.setattr(Setting, "fits", lambda self, needed: False)
    (record,) = gpu_step.check_step(setting, "step")
    assert record.ok and record.value is None and "left out" in record.detail


def test_attention_fails_where_a_gradient_is_off(setting):
    case = gpu_ceilings.TwoCopyAttention(setting, gpu_ceilings.Shape(2, 2, 64, 16, 16))

    def slightly_wrong(queries, keys, values):
        return case.masked(queries, keys, values + 0.02 * (values - values.detach()))  # of the gradient alone

    record = case.measured("wrong", slightly_wrong)
    assert not record.ok and case.measured("right", case.masked).ok


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_fails_where_its_mask_is_another(setting):
    case = gpu_ceilings.TwoCopyAttention(setting, gpu_ceilings.Shape(2, 2, 64, 16, 16))
    assert case.compared_forward("flex", case.flex()).ok
    case.dropped_BN = ~case.dropped_BN
    assert not case.compared_forward("flex", case.flex()).ok


def test_a_model_with_random_weights_starts_as_training_does(setting):
    model = random_model(setting.config("tiny", "stage=2"), setting.groups)
    reference = model.reference.state_dict()
    assert all(torch.equal(tensor, reference[name]) for name, tensor in model.vae.encoder.state_dict().items())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    block = model.dit.blocks[0]
    assert not block.attention_gate.linear.weight.any() and block.attention.qkv.weight.std() > 0


def test_graphs_pass_where_the_tokens_are_those_without_them(setting, monkeypatch):
    monkeypatch.setattr(gpu_generation, "record_on_cuda", gpu_generation.repeat_in_python)
    model = random_model(setting.config("tiny", "stage=2"), setting.groups, spread=0.02).eval().requires_grad_(False)
    prompts = [[1, 2, 3], [4, 5, 6]]
    record = gpu_generation.with_graphs(setting, model.vae, model.dit, prompts, 16)
    assert record.ok and record.value > 0 and "differ by 0.0e+00" in record.detail

    def wrong(run):
        _, output = gpu_generation.repeat_in_python(run)
        return lambda: output.add_(1.0), output

    monkeypatch.setattr(gpu_generation, "record_on_cuda", wrong)
    assert not gpu_generation.with_graphs(setting, model.vae, model.dit, prompts, 16).ok


def test_both_forms_of_saving_are_measured(setting):
    records = {record.name: record for record in gpu_checkpoint.check_save(replace(setting, quick=False))}
    assert all(record.ok and record.value > 0 for record in records.values())
    assert list(records) == ["checkpoint.synchronous", "checkpoint.asynchronous.wait"]
