"""wandb without a network: what the jobs of a run leave, and what `cola sync` makes of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cola_megatron.config import dump_config, load_config
from launchers.sync_command import waiting


@pytest.fixture
def resumed(tiny, tmp_path: Path) -> Path:
    """The run folder of a run of two jobs that recorded offline."""
    for steps in (2, 4):
        config = tiny(1, f"training.stop_after={steps}", "training.log.wandb=offline", "training.checkpoint.every=2")
        (tmp_path / "config.yaml").write_text(dump_config(config))
        subprocess.run(
            [sys.executable, "-m", "launchers.cli", "train", str(tmp_path / "config.yaml")],
            env={**os.environ, "WANDB_MODE": "offline"},
            check=True,
            capture_output=True,
        )
    return config.run_folder


def cola(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "launchers.cli", *map(str, arguments)],
        env={**os.environ, "WANDB_API_KEY": "", "WANDB_BASE_URL": "http://127.0.0.1:1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_records_of_all_jobs_of_a_run(resumed: Path) -> None:
    records = waiting(resumed)
    run_id = (resumed / "wandb_id").read_text()
    assert len(records) == 2 and all(record.name.endswith(run_id) for record in records)
    done = cola("sync", resumed, "--dry-run", "--json")
    assert json.loads(done.stdout) == [{"run_folder": str(resumed), "records": [str(record) for record in records]}]
    (records[0] / f"run-{run_id}.wandb.synced").touch()
    assert waiting(resumed) == records[1:]
    failed = cola("sync", resumed)
    assert failed.returncode == 1
    (line,) = failed.stderr.strip().splitlines()
    assert "wandb did not take it" in line and "wandb login" in line


def test_runs_of_an_array_share_a_group() -> None:
    from launchers.slurm.array import configs_of

    (config,) = configs_of("sweep", "tiny", ["stage=1"], ["low seed=1"])
    assert config.training.log.wandb_group == "sweep"
    assert load_config("tiny").training.log.wandb_group is None
