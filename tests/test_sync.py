"""wandb without a network: what the jobs of a run leave, and what `cola sync` makes of it."""

import json
import os
from pathlib import Path

import pytest

from cola_megatron.config import dump_config, load_config
from launchers.sync_command import waiting
from tests.commands import cola


@pytest.fixture
def resumed(tiny, tmp_path: Path) -> Path:
    """The run folder of a run of two jobs that recorded offline."""
    for steps in (2, 4):
        config = tiny(1, f"training.stop_after={steps}", "training.log.wandb=offline", "training.checkpoint.every=2")
        (tmp_path / "config.yaml").write_text(dump_config(config))
        done = cola("train", tmp_path / "config.yaml", env={**os.environ, "WANDB_MODE": "offline"})
        assert done.returncode == 0, done.stderr
    return config.run_folder


OFFLINE = {"WANDB_API_KEY": "", "WANDB_BASE_URL": "http://127.0.0.1:1"}


def test_the_records_of_all_jobs_of_a_run(resumed: Path) -> None:
    records = waiting(resumed)
    run_id = (resumed / "wandb_id").read_text()
    assert len(records) == 2 and all(record.name.endswith(run_id) for record in records)
    done = cola("sync", resumed, "--dry-run", "--json", env={**os.environ, **OFFLINE})
    assert json.loads(done.stdout) == [{"run_folder": str(resumed), "records": [str(record) for record in records]}]
    (records[0] / f"run-{run_id}.wandb.synced").touch()
    assert waiting(resumed) == records[1:]
    failed = cola("sync", resumed, env={**os.environ, **OFFLINE})
    assert failed.returncode == 1
    (line,) = failed.stderr.strip().splitlines()
    assert "wandb did not take it" in line and "wandb login" in line


def test_runs_of_an_array_share_a_group() -> None:
    from launchers.slurm.array import configs_of

    (config,) = configs_of("sweep", "tiny", ["stage=1"], ["low seed=1"])
    assert config.training.log.wandb_group == "sweep"
    assert load_config("tiny").training.log.wandb_group is None
