"""`cola report` on every kind of run: what it tells, what it leaves out, and that it says so."""

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cola_megatron.errors import UserError
from cola_megatron.held_out.measure_checkpoint import measure_checkpoint
from cola_megatron.reporting.continuations import Sampling
from cola_megatron.reporting.observed import ALL, Observed, observe
from cola_megatron.reporting.report import Report
from cola_megatron.reporting.run_page import report_of_run
from cola_megatron.reporting.run_records import Run, read_run, stage_one_of
from cola_megatron.training.loop import train
from launchers.cli import app

pytest.importorskip("matplotlib")
OLD = Path(__file__).parent / "data" / "old_runs" / "schema_1"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Runs of both stages, stopped early; not the working directory, though paths in their configs are relative."""
    shutil.copytree(OLD, tmp_path / "old")
    return tmp_path / "old" / "runs"


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch):
    """Rendering takes most of the time; tests/test_report.py does it."""
    monkeypatch.setattr("cola_megatron.reporting.pictures.png_of", lambda figure, dots: b"")


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_config(folder: Path, *changes: tuple[str, str]) -> None:
    text = (folder / "config.yaml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "config.yaml").write_text(text)


def seen(run: Run, tmp_path: Path, **options) -> Observed:
    arguments = {
        "data": None,
        "export": None,
        "samples_file": tmp_path / "samples.json",
        "sampling": Sampling(samples=2),
    }
    return observe(run, **{**arguments, **options})


def values(report: Report) -> dict[str, str]:
    return {row.what.strip(): row.value for table in report.tables for row in table.rows}


def cli(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.output


def test_both_stages_are_told_apart_from_any_working_directory(runs: Path, tmp_path: Path):
    run = read_run(runs / "stage2")
    report = report_of_run(run, seen(run, tmp_path))
    told = values(report)
    assert report.notes == []
    assert report.status == "Stage 2, stopped at step 4 of 6."
    summaries = {stage: json.loads((runs / f"stage{stage}" / "summary.json").read_text()) for stage in (1, 2)}
    for stage, summary in summaries.items():
        name = f"stage {stage}, stage{stage}"
        assert told[f"{name}: tokens seen"] == f"{summary['tokens']:,}"
        assert told[f"{name}: model FLOPs"] == f"{summary['model_flops']:.3e}"
    assert len(report.samples) == 2
    assert all(sample.truth for sample in report.samples)
    assert told["dead directions of the latent"].startswith("4 of 4 (eigenvalues ")  # after four steps
    assert "±" in told["held-out reconstruction accuracy"]
    assert told["what the prior has learned"].startswith("nothing yet")
    assert report.stage_one.records
    parameters = [told[name] for name in ("text encoder", "diffusion prior (DiT)", "text decoder")]
    assert told["parameters"] == f"{sum(int(value.replace(',', '')) for value in parameters):,}"
    about = {row.what: row.value for row in report.about}
    assert about["git revision"] == "d5ad06f3eccd476b1b35a47c42779e8c599a329a"
    assert "torch 2.13.0+cpu" in about["versions"]
    assert "context_dropout: 0.1" in report.config


def test_a_loss_at_a_runs_own_times_is_not_shown_as_one_at_uniform_times(runs: Path):
    run = read_run(runs / "stage2")
    report = report_of_run(run, Observed(samples_absent="not asked for"))
    told = values(report)
    assert told["flow-matching loss, the run's own times"] == "2.7304"
    assert "flow-matching loss, uniform t" not in told
    assert "what the prior has learned" not in told
    (evaluation,) = (record for record in run.records if record["kind"] == "evaluation")
    assert not any(re.fullmatch(r"flow_matching_loss(_bin_\d)?", name) for name in evaluation)
    assert evaluation["flow_matching_loss_training_times_bin_0"] == pytest.approx(3.0256642438471317)


def test_stage_one_alone(runs: Path, tmp_path: Path):
    run = read_run(runs / "stage1")
    report = report_of_run(run, seen(run, tmp_path))
    assert report.stage_one.records and not report.stage_two.records
    assert report.stage_two.absent == "this is a run of stage 1"
    assert report.samples_absent == "a run of stage 1 has no prior to generate from"
    assert "diffusion prior (DiT)" not in values(report)
    assert "held-out reconstruction accuracy" in values(report)
    assert "flow-matching loss, uniform t" not in values(report)


def test_from_scratch_there_was_no_stage_one(tiny, tmp_path: Path):
    config = tiny(2, "training.steps=2", "training.stop_after=1", "training.evaluation.every=1")
    train(config, progress=False)
    run = read_run(config.run_folder)
    report = report_of_run(run, seen(run, tmp_path))
    told = values(report)
    assert any("from_scratch=true" in note for note in report.notes)
    assert not report.stage_one.records
    assert not any(name.startswith("stage 1,") for name in told)
    assert "flow-matching loss, uniform t" in told  # a record of today
    assert len(report.samples) == 2
    with pytest.raises(UserError, match="from_scratch"):
        stage_one_of(run, OLD / "runs" / "stage1")


def test_a_start_from_published_weights_has_neither_curves_nor_cost(runs: Path, tmp_path: Path):
    (tmp_path / "old" / "published" / "cola_vae").mkdir(parents=True)
    change_config(runs / "stage2", ("stage_one: runs/stage1", "stage_one: published"))
    report = report_of_run(read_run(runs / "stage2"), Observed())
    assert "published, which are no run: they have neither curves nor cost" in report.notes[0]
    assert not report.stage_one.records
    assert not any(name.startswith("stage 1,") for name in values(report))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda runs: shutil.rmtree(runs / "stage1"), "does not exist"),
        (lambda runs: change_config(runs / "stage1", ("encoder_layers: 1", "encoder_layers: 2")), "another VAE"),
        (lambda runs: change(runs / "stage1" / "attempts.jsonl", began=4e9), "began after this one"),
        (lambda runs: change_config(runs / "stage2", ("stage_one: runs/stage1", "stage_one: runs/stage2")), "stage 2"),
    ],
    ids=["gone", "another model", "trained anew", "a run of stage 2"],
)
def test_another_run_is_not_shown_as_its_stage_one(runs: Path, spoil, why: str):
    spoil(runs)
    report = report_of_run(read_run(runs / "stage2"), Observed())
    assert why in report.notes[0]
    assert not report.stage_one.records
    assert not any(name.startswith("stage 1,") for name in values(report))


def test_stage_one_counts_to_the_checkpoint_that_was_taken(runs: Path):
    at = "runs/stage1/checkpoints/step_00000003"
    (runs.parent / at).mkdir()
    change_config(runs / "stage2", ("stage_one: runs/stage1", f"stage_one: {at}"))
    first, step, why = stage_one_of(read_run(runs / "stage2"))
    assert (first is not None, step, why) == (True, 3, "")


def in_progress(folder: Path) -> None:
    """As it stands while the run trains, with no checkpoint yet, and a log that a full disk has damaged."""
    shutil.rmtree(folder / "checkpoints")
    (folder / "summary.json").unlink()
    change(folder / "progress.json", state="training", step=5)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[1] = "\0\0\0 not JSON\n"
    (folder / "metrics.jsonl").write_text("".join([*lines, '{"kind": "train", "st']))


def test_a_run_in_progress_without_a_checkpoint(runs: Path, tmp_path: Path):
    folder = runs / "stage2"
    in_progress(folder)
    run = read_run(folder)
    report = report_of_run(run, seen(run, tmp_path))
    assert report.status.startswith("Stage 2, in progress (training): step 5 of 6; last sign of life 2026-")
    assert any("lines that cannot be read are left out, 1 in all: 2" in note for note in report.notes)
    assert any("no complete checkpoint yet" in note for note in report.notes)
    assert [record["step"] for record in report.stage_two.records if record["kind"] == "train"] == [1, 3, 4]
    assert values(report)["stage 2, stage2: tokens seen"] == f"{5 * 8 * 32:,}"
    assert any("measured at step 4 by the run" in table.title for table in report.tables)


def test_a_folder_with_a_config_alone(runs: Path, tmp_path: Path):
    for path in (runs / "stage2").iterdir():
        if path.name != "config.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (runs / "stage2" / "progress.json").write_text("{")
    report = report_of_run(read_run(runs / "stage2"), Observed())
    assert "progress.json" in report.status
    assert any("metrics.jsonl does not exist" in note for note in report.notes)
    assert any("progress.json cannot be read" in note for note in report.notes)
    assert values(report)["held-out measurements"] == "none yet"
    with pytest.raises(UserError, match=r"no run folder: it has no config\.yaml"):
        read_run(runs)


def test_data_that_are_gone_cost_the_samples_and_not_the_page(runs: Path, tmp_path: Path):
    shutil.rmtree(runs.parent / "data")
    run = read_run(runs / "stage2")
    report = report_of_run(run, seen(run, tmp_path))
    assert sum("was not possible" in note for note in report.notes) == 2
    assert not report.samples
    with pytest.raises(UserError):  # but not where somebody named them
        seen(run, tmp_path, data=str(tmp_path / "nothing"))


def test_held_out_samples_are_a_limit_with_its_interval(runs: Path, tmp_path: Path):
    run = read_run(runs / "stage2")
    some = seen(run, tmp_path, held_out_samples=4).measured
    assert some["samples"] == 4
    assert some == measure_checkpoint(run.folder, runs.parent / "data", 4)
    every = seen(run, tmp_path, held_out_samples=ALL).measured
    assert every["samples"] > 4
    assert {f"{name}_standard_error" for name in ("reconstruction_accuracy", "flow_matching_loss")} <= set(some)


def test_an_evaluation_of_three_items_has_a_wide_interval(runs: Path, tmp_path: Path):
    from cola_megatron.evaluation.results import TaskResult

    TaskResult("lambada", "a model", {}, [{"correct": correct} for correct in (True, False, False)]).write(tmp_path)
    cli(runs / "stage2", "--curves-only", "--evaluation", tmp_path)
    page = (runs / "stage2" / "report.html").read_text()
    assert "33.3% of 3 items (95%: 6.1% to 79.2%)" in page
    assert "no model was loaded (--curves-only)" in page.lower()


def test_it_is_watched_until_the_run_ends(runs: Path, monkeypatch: pytest.MonkeyPatch):
    folder, pages = runs / "stage2", []
    in_progress(folder)
    monkeypatch.setattr("launchers.report_command.SILENT_SECONDS", float("inf"))

    def sleep(seconds: float) -> None:
        pages.append((folder / "report.html").read_text())
        change(folder / "progress.json", step=6, state="training" if len(pages) < 2 else "finished")

    monkeypatch.setattr("launchers.report_command.time.sleep", sleep)
    output = cli(folder, "--watch", 5, "--curves-only")
    pages.append((folder / "report.html").read_text())
    assert ["step 5 of 6" in page for page in pages] == [True, False, False]
    assert ["in progress" in page for page in pages] == [True, True, False]
    assert ['http-equiv="refresh" content="5"' in page for page in pages] == [True, True, False]
    assert output.count("report.html") == 2
    change(folder / "progress.json", state="training", time=0.0)
    monkeypatch.setattr("launchers.report_command.SILENT_SECONDS", 60.0)
    assert "silent for more than 60 s" in cli(folder, "--watch", 5, "--curves-only")
