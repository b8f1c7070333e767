"""Layouts of a study's runs: what `cola sweep plan` prints is what `cola sweep submit` trains."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from cola_megatron.config import ConfigError, RunConfig, dump_config, load_config
from cola_megatron.planning.plan import layout_of, plan
from cola_megatron.studies.expansion import expand
from cola_megatron.studies.folder import StudyFolder
from cola_megatron.studies.layouts import cluster_of, laid_out
from cola_megatron.studies.study_file import StudyConfig, load_study
from launchers.sweep_plan import reasons, shares_of
from tests import commands

PLANNED = {"layouts": {"gpu": "a100"}}
GPUS = 4


def written(folder: Path, **over: Any) -> Path:
    """Two arms that differ in a rate, and so have one layout."""
    tree = {
        "name": "small",
        "arms": {"ar": {"config": "tiny-autoregressive"}, "md": {"config": "tiny-masked-diffusion"}},
        "overrides": {"training.schedule.warmup_steps": 2, "training.precision": "bf16"},
        "budgets": {"column": "steps", "amounts": [20]},
        "seeds": [1, 2],
        "data": {"path": "data"},
        **over,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def study(folder: Path, gpus: int = GPUS, **over: Any) -> StudyConfig:
    return laid_out(load_study(written(folder, **over)), gpus, gpus)


def test_what_is_planned_is_what_the_runs_are_trained_with(tmp_path):
    planned = study(tmp_path, **PLANNED)
    cluster = cluster_of("a100", GPUS, GPUS)
    bare = expand(study(tmp_path), tmp_path).runs
    for name, run in expand(planned, tmp_path).runs.items():
        best = plan(bare[name].config, cluster)[0][0]
        assert run.config == load_config(*_words(bare[name].config, best.overrides, tmp_path)), name
        assert run.config.training.micro_batch_size != bare[name].config.training.micro_batch_size
    shares = shares_of(planned, expand(planned, tmp_path), cluster)
    of_configs = shares_of(study(tmp_path), expand(study(tmp_path), tmp_path), cluster)
    for share, other in zip(shares, of_configs, strict=True):
        assert share.costs is not None and share.costs.submitted is not None and share.costs.fastest is None
        assert other.costs is not None and other.costs.fastest is not None
        assert share.costs.submitted.gpu_hours == pytest.approx(other.costs.fastest.gpu_hours)
        assert share.costs.submitted.layout.overrides == other.costs.fastest.layout.overrides


def _words(config: RunConfig, overrides: list[str], folder: Path) -> tuple[str, list[str]]:
    path = folder / "own.yaml"
    path.write_text(dump_config(config))
    return str(path), overrides


def test_a_layout_that_cannot_be_used_is_said_with_its_reason(tmp_path):
    over = {"overrides": {"training.schedule.warmup_steps": 2, "training.micro_batch_size": 16}}
    own = study(tmp_path, **over)
    shares = shares_of(own, expand(own, tmp_path), cluster_of("h100", 4, 4))
    assert list(reasons(shares)) == [
        "the own layout of ar and md cannot be used: training.micro_batch_size=16 does not divide the 8 sequences of "
        "each of 4 replicas"
    ]
    assert [share.as_json()["submitted"] for share in shares] == [None, None]
    cut = study(tmp_path, overrides={**over["overrides"], "parallel.tensor_parallel_size": 2})
    with pytest.raises(ConfigError, match=r"3 GPUs are not divisible by parallel\.tensor_parallel_size=2"):
        layout_of(expand(cut, tmp_path).runs["ar-20-s1"].config, cluster_of("h100", 3, 3))


def test_what_the_file_sets_itself_is_kept(tmp_path):
    overrides = {"training.schedule.warmup_steps": 2, "training.micro_batch_size": 2}
    runs = expand(study(tmp_path, **PLANNED, overrides=overrides), tmp_path).runs
    assert {run.config.training.micro_batch_size for run in runs.values()} == {2}
    counted = study(tmp_path, **PLANNED, budgets={"column": "hardware", "amounts": [1e12]})
    configs = [run.config for run in expand(counted, tmp_path).runs.values()]
    assert not any(config.training.activation_checkpointing for config in configs), "budgets are counted without it"


def test_layouts_are_recorded_and_not_planned_again_where_a_study_is_opened(tmp_path, monkeypatch):
    opened = StudyFolder.begin(tmp_path / "out", study(tmp_path, **PLANNED))
    runs = opened.expanded.runs
    opened.prepare(runs["ar-20-s1"])
    recorded = json.loads((opened.run_folder("ar-20-s1") / "study.json").read_text())["study"]["layouts"]
    assert (recorded["gpu"], recorded["gpus"]) == ("a100", GPUS) and recorded["of_runs"].keys() == runs.keys()
    monkeypatch.setattr("cola_megatron.studies.layouts.rank", None)
    for again in (StudyFolder.open(tmp_path / "out"), StudyFolder.rebuild(tmp_path / "out")):
        assert {name: run.config for name, run in again.expanded.runs.items()} == {
            name: run.config for name, run in runs.items()
        }


def test_runs_that_arms_share_stay_one_run(tmp_path):
    arms = {name: {"config": "tiny-autoregressive"} for name in ("rate", "order")}
    axes = {
        "rate": {"arms": ["rate"], "settings": {"own": {}, "low": {"training.optimizer.learning_rate": 1e-3}}},
        "order": {"arms": ["order"], "settings": {"own": {}, "other": {"data.seed": 1}}},
    }
    over = {"arms": arms, "axes": axes, "seeds": [1]}
    assert set(expand(study(tmp_path, **PLANNED, **over), tmp_path).runs) == set(
        expand(study(tmp_path, **over), tmp_path).runs
    )


def test_the_same_study_goes_on_on_another_number_of_gpus(tmp_path):
    opened = StudyFolder.begin(tmp_path / "out", study(tmp_path, **PLANNED))
    opened.prepare(opened.expanded.runs["ar-20-s1"])
    (opened.run_folder("ar-20-s1") / "log.txt").write_text("step 3\n")
    more = StudyFolder.begin(tmp_path / "out", study(tmp_path, 8, **PLANNED))
    assert more.study.layouts is not None and more.study.layouts.gpus == 8


def test_submit_writes_the_planned_layout(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    for name, script in {"squeue": "", "scontrol": "", "sbatch": "echo 7"}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "site.yaml").write_text("gpus_per_node: 4\n")
    path, out = written(tmp_path, **PLANNED), tmp_path / "out"
    done = commands.cola("sweep", "submit", path, "--output", out, "--site", tmp_path / "site.yaml")
    assert done.returncode == 0, done.stderr
    planned = expand(study(tmp_path, **PLANNED), out).runs
    for name, run in planned.items():
        (config,) = (out / "runs" / name / "submissions").glob("*/config.yaml")
        sent = load_config(str(config))
        assert (sent.parallel, sent.training.micro_batch_size) == (
            run.config.parallel,
            run.config.training.micro_batch_size,
        )


@pytest.mark.parametrize("command", ["submit", "run"])
def test_without_gpus_there_is_nothing_to_plan(command, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "site.yaml").write_text("gpus_per_node: 0\nexclusive: false\n")
    more = ["--site", tmp_path / "site.yaml"] if command == "submit" else []
    path = written(tmp_path, **PLANNED)
    done = commands.cola("sweep", command, path, "--output", tmp_path / "out", *more)
    assert done.returncode == 2 and "take layouts out of its file" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_gpu_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(ConfigError, match=r"h1000: not in the table of .*h100"):
        study(tmp_path, layouts={"gpu": "h1000"})
