"""`cola compare`: figures, differences and curves of several runs, old and unfinished ones among them."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cola_megatron.config import ConfigError, RunConfig, dump_config, load_config
from cola_megatron.errors import UserError
from cola_megatron.reporting import comparison
from cola_megatron.reporting.compared_runs import HEADLINE, OWN_TIMES, read_runs
from launchers.cli import app
from tests.support import TINY

OLD = Path(__file__).parent / "data" / "old_runs" / "schema_1" / "runs"


def cola(*arguments: object) -> str:
    """Runs a command in this process and returns what it printed; its error is raised as itself."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def records_of(steps: int, loss: float = 1.5) -> list[dict]:
    """What a stage-2 run of today leaves: a record of every step, a measurement every tenth."""
    records: list[dict] = []
    for step in range(1, steps + 1):
        records.append(
            {"kind": "train", "step": step, "loss": 9.0 / step, "flow_matching": loss, "seconds": 2.0 * step}
        )
        if step % 10 == 0:
            measured = {HEADLINE: loss + 1 / step, f"{HEADLINE}_standard_error": 0.01, OWN_TIMES: loss - 0.1}
            bins = {f"{HEADLINE}_bin_0": loss, "samples": 8.0}
            records.append({"kind": "evaluation", "step": step, **measured, **bins, "seconds": 2.0 * step})
    return records


@pytest.fixture
def make_run(tmp_path: Path):
    """`make_run(name, *overrides)`: a run folder of 20 of 20 steps; nothing is trained."""

    def make(name: str, *overrides: str, records: list[dict] | None = None, state: str = "finished") -> Path:
        config = load_config(
            "tiny", [*TINY, f"name={name}", f"runs_folder={tmp_path / 'runs'}", "training.steps=20", *overrides]
        )
        return write_run(config, records_of(20) if records is None else records, state)

    return make


def write_run(config: RunConfig, records: list[dict], state: str) -> Path:
    folder = config.run_folder
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    step = max((record["step"] for record in records), default=0)
    (folder / "progress.json").write_text(json.dumps({"step": step, "state": state, "time": 1e9}))
    return folder


def test_the_table_has_what_the_runs_came_to(make_run):
    runs = read_runs([make_run("first"), make_run("second", records=records_of(15, 1.2), state="training")])
    rows = {row[0]: row[1:] for row in comparison.table(runs)}
    assert rows[""] == ["first", "second"]
    assert rows["state"][0] == "finished"
    assert re.fullmatch(r"training, no sign for \d+ h", rows["state"][1])
    assert rows["steps"] == ["20 of 20", "15 of 20"]
    assert rows["tokens"] == [f"{20 * 8 * 32:,}", f"{15 * 8 * 32:,}"]
    assert rows["measured at step"] == ["20", "10"]
    assert rows["on held-out sequences"] == ["8", "8"]
    assert rows["flow matching loss, equally spaced t"] == ["1.5500 ± 0.0196", "1.3000 ± 0.0196"]
    assert rows["flow matching loss, the run's own t"] == ["1.4000", "1.1000"]
    assert not any("bin" in name or "standard error" in name for name in rows)
    first = float(rows["model FLOPs of this stage"][0])
    assert float(rows["model FLOPs of this stage"][1]) == pytest.approx(first * 15 / 20, rel=1e-3)


def test_model_flops_are_those_of_the_summary():
    for stage in ("stage1", "stage2"):
        summary = json.loads((OLD / stage / "summary.json").read_text())
        run = next(run for run in read_runs([OLD / "stage1", OLD / "stage2"]) if run.label == stage)
        assert run.flops_of_step(run.step) == summary["model_flops"]
        assert run.step * run.tokens_per_step == summary["tokens"]


def test_a_loss_of_an_old_record_is_not_taken_for_today_s(make_run):
    runs = read_runs([OLD / "stage2", make_run("today")])
    rows = {row[0]: row[1:] for row in comparison.table(runs)}
    assert rows["flow matching loss, equally spaced t"] == ["-", "1.5500 ± 0.0196"]
    assert rows["flow matching loss, the run's own t"] == ["2.7304 (old record)", "1.4000"]
    assert [run.has_old_measurements for run in runs] == [True, False]
    (note,) = (note for note in comparison.notes(runs) if "older version" in note)
    assert note.startswith("stage2: ")
    assert not any(HEADLINE in record for record in runs[0].records)


def test_differences_keep_free_keys_apart(make_run):
    runs = read_runs([make_run("a", "seed=1"), make_run("b", "seed=2", "training.log.every=5")])
    found = {each.key: (each.values, each.is_free) for each in comparison.differences(runs)}
    assert found == {"seed": (("1", "2"), False), "training.log.every": (("1", "5"), True)}


def test_keys_of_other_schemas_are_compared_as_those_of_today(make_run):
    found = {each.key for each in comparison.differences(read_runs([OLD / "stage2", make_run("today")]))}
    # Both were renamed or added since; neither differs.
    assert not found & {"training.optimizer.clip", "training.optimizer.max_gradient_norm", "training.schedule.decay"}
    assert "schema" not in found and "training.evaluation.time_bins" not in found


def test_runs_of_one_name_go_by_their_folders(make_run, tmp_path):
    one = make_run("same")
    two = tmp_path / "elsewhere" / "same"
    shutil.copytree(one, two)
    assert [run.label for run in read_runs([one, two])] == [str(one), str(two)]


def test_wrong_use_is_one_line(make_run, tmp_path, monkeypatch):
    one, two = make_run("one"), make_run("two")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="needs two run folders or more, not 1"):
        read_runs([one])
    with pytest.raises(ConfigError, match="the same run twice"):
        read_runs([one, two, one])
    with pytest.raises(ConfigError, match=r"^runs/\.\./runs/one and .*/one: the same run twice"):
        read_runs([Path("runs/../runs/one"), one])
    with pytest.raises(ConfigError, match="no run folder; it holds the runs one, two: give each of them"):
        read_runs([one, tmp_path / "runs"])
    with pytest.raises(ConfigError, match="nowhere: no run folder; there is no such folder"):
        read_runs([one, tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty: no run folder; `cola train` writes"):
        read_runs([one, tmp_path / "empty"])
    with pytest.raises(ConfigError, match="leave --no-page out"):
        cola("compare", one, two, "--no-page", "--against", "tokens")


def test_the_command_prints_the_same_as_json(make_run, tmp_path, monkeypatch):
    one, two = make_run("one", "seed=1"), make_run("two", "seed=2", records=[], state="starting")
    monkeypatch.chdir(tmp_path)
    shown = cola("compare", one, two, "--no-page")
    assert "configs differ in\n  seed  1  2" in shown
    assert not (tmp_path / "comparison").exists()
    found = json.loads(cola("compare", one, two, "--no-page", "--json"))
    assert found["differences"] == {"seed": {"one": "1", "two": "2"}}
    assert found["runs"]["one"]["metrics"][HEADLINE] == 1.55
    assert (found["runs"]["two"]["step"], found["runs"]["two"]["measured_at"]) == (0, None)
    assert "Example" in cola("compare", "--help")


@pytest.fixture
def coarse_pictures(monkeypatch: pytest.MonkeyPatch):
    """Fewer dots: the time goes into them."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("cola_megatron.reporting.figure_style.DOTS_PER_INCH", 30)


@pytest.mark.filterwarnings("error")
def test_the_page_needs_nothing_else(make_run, tmp_path, coarse_pictures):
    runs = [make_run("one"), make_run("two", "seed=2"), OLD / "stage1"]
    shown = cola("compare", *runs, "--output", tmp_path / "out", "--against", "tokens")
    path = tmp_path / "out" / "comparison.html"
    assert shown.splitlines()[-1] == str(path)
    page = path.read_text()
    assert not re.search(r"https?://|url\(|@import|<script|<link", page)
    ids = re.findall(r'<figure id="(\w+)">', page)
    of_stage_one = ("reconstruction_accuracy", "reconstruction_nll", "reconstruction", "vae_logsnr")
    drawn = (HEADLINE, OWN_TIMES, "flow_matching", *of_stage_one, "gradient_norm", "tokens_per_second")
    assert ids == [f"compare_{key}" for key in drawn]
    assert {file.stem for file in (tmp_path / "out" / "figures").iterdir()} == set(ids)
    assert "Not in the records of stage1." in page
    assert "Training loss (losses of different stages or families are sums of different terms)" in page
    # Another comparison leaves no picture of this one.
    cola("compare", OLD / "stage1", OLD / "stage2", "--output", tmp_path / "out")
    assert f"compare_{HEADLINE}" not in {file.stem for file in (tmp_path / "out" / "figures").iterdir()}


@pytest.mark.filterwarnings("error")
def test_runs_are_told_apart_without_colour_and_the_legend_lies_on_nothing(make_run, coarse_pictures):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from cola_megatron.reporting.compare_figures import CURVES, overlaid

    many = [make_run(f"a-run-with-a-rather-long-name-{number}") for number in range(9)]
    figure = overlaid(read_runs(many), next(curve for curve in CURVES if curve.key == HEADLINE), "flops")
    left, right = figure.axes
    lines = [line for line in left.lines if not str(line.get_label()).startswith("_")]
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == 9
    assert "FLOPs" in right.get_xlabel() and left.get_xlabel() == "Training step"
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    for axes in figure.axes:
        assert not box.overlaps(axes.get_tightbbox())
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= -1
    assert [text.get_text() for text in legend.get_texts()] == [folder.name for folder in many]


@pytest.mark.filterwarnings("error")
def test_curves_of_old_losses_are_named_and_apart(make_run, coarse_pictures):
    from cola_megatron.reporting.compare_figures import CURVES, overlaid

    runs = read_runs([OLD / "stage2", make_run("today")])
    shown = {
        curve.key: [text.get_text() for text in overlaid(runs, curve, "flops").legends[0].get_texts()]
        for curve in CURVES
        if curve.key in (HEADLINE, OWN_TIMES)
    }
    assert shown == {HEADLINE: ["today"], OWN_TIMES: ["stage2 (old records)", "today"]}


def test_without_matplotlib_one_line_names_the_extra_and_the_way_around(make_run, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("cola_megatron.reporting.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="make setup EXTRAS=report, or give --no-page"):
        cola("compare", make_run("one"), make_run("two"), "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "steps" in cola("compare", tmp_path / "runs" / "one", tmp_path / "runs" / "two", "--no-page")


@pytest.mark.filterwarnings("error")
def test_unusual_names_and_numbers_are_drawn(make_run, tmp_path, coarse_pictures, monkeypatch):
    one = make_run("one", records=[{**record, "loss": float("nan")} for record in records_of(1)])
    monkeypatch.chdir(tmp_path)
    odd = Path("_odd $a$ <b>") / "one"
    shutil.copytree(one, odd)
    cola("compare", odd, one)
    page = (tmp_path / "comparison" / "comparison.html").read_text()
    assert "_odd $a$ &lt;b&gt;" in page and "<b>" not in page
