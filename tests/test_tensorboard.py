"""Event files for TensorBoard: the records of metrics.jsonl, every step once, by the main process alone."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cola_megatron.config import ConfigError
from cola_megatron.records.metrics import MetricsLog, read_metrics
from cola_megatron.records.recorder import open_recorder
from cola_megatron.records.tensorboard_log import FOLDER
from cola_megatron.training.loop import train

ON = "training.log.tensorboard=true"


def test_without_the_package_one_line_names_the_extra_and_nothing_is_written(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    config = tiny(1, ON)
    with pytest.raises(ConfigError, match=r"^training.log.tensorboard=true needs .* make setup EXTRAS=report"):
        train(config, progress=False)
    assert not config.run_folder.exists()
    train(tiny(1, "training.steps=1"), progress=False)  # nobody else needs it


def test_other_processes_write_nothing(tiny):
    config = tiny(1, ON)
    with open_recorder(config, 0, SimpleNamespace(is_main=False, barrier=lambda: None), False) as recorder:
        recorder.record("train", 1, {"loss": 1.0})
    assert not config.run_folder.exists()


@pytest.fixture
def scalars():
    """`scalars(run_folder)`: {tag: [(step, value), ...]}, as TensorBoard reads them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def read(run_folder: Path) -> dict[str, list[tuple[int, float]]]:
        found = accumulator.EventAccumulator(str(run_folder / FOLDER), size_guidance={"scalars": 0})
        found.Reload()
        return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}

    return read


def test_a_resumed_run_shows_every_step_once(tiny, scalars):
    config = tiny(1, ON)
    config.run_folder.mkdir(parents=True)
    # The first job came to step 4, and died before the checkpoint of step 4 was there.
    for resumed_at, steps, loss in ((0, range(1, 5), 1.0), (2, range(3, 7), 2.0)):
        log = MetricsLog(config, resumed_at)
        for step in steps:
            log.write("train", step, {"loss": loss, "seconds": 0.5, "note": "no number"})
        log.close()
    found = scalars(config.run_folder)
    assert found["train/loss"] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    assert found.keys() == {"train/loss", "train/seconds"}
    assert len(list((config.run_folder / FOLDER).iterdir())) == 2


def test_a_run_writes_what_metrics_jsonl_has(tiny, scalars):
    for stop in ("2", "null"):
        config = tiny(1, ON, "training.steps=4", f"training.stop_after={stop}")
        train(config, progress=False)
    found = scalars(config.run_folder)
    for record in read_metrics(config.run_folder / "metrics.jsonl"):
        for name, value in record.items():
            if name not in ("kind", "step"):
                shown = dict(found[f"{record['kind']}/{name}"])
                assert shown[record["step"]] == pytest.approx(value, rel=1e-6), name
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3, 4]
