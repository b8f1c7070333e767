"""The figures and the page of a study, finished or not, its commands, and `Study` for a notebook."""

from __future__ import annotations

import csv
import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cola_megatron.errors import UserError
from cola_megatron.scaling import Study
from cola_megatron.studies.report.fits import fit_study
from cola_megatron.studies.report.samples import side_by_side
from cola_megatron.studies.results import results_of
from launchers import sweep_results
from tests import synthetic_studies as synthetic

app = typer.Typer()
for command in (sweep_results.fit, sweep_results.plot, sweep_results.report):
    app.command()(command)


def cola_sweep(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def coarse_pictures(monkeypatch: pytest.MonkeyPatch):
    """Fewer dots: the time goes into them."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("cola_megatron.reporting.figure_style.DOTS_PER_INCH", 30)


def page_of(folder: Path, found: dict) -> str:
    from cola_megatron.studies.report.page import write_report

    synthetic.write(folder, found)
    results = results_of(found)
    return write_report(folder, results, fit_study(results, bootstrap=40)).read_text()


@pytest.mark.filterwarnings("error")
def test_the_page_needs_nothing_else_and_has_everything(tmp_path, coarse_pictures):
    page = page_of(tmp_path, synthetic.one_size(budgets=(1e12, 3e12, 1e13)))
    assert not re.search(r"https?://|url\(|@import|<script|<link", page)
    columns = ("model", "nominal", "hardware")
    drawn = [f"{quantity}_against_{column}" for quantity in ("loss", "score") for column in columns]
    drawn += ["residuals_loss", "residuals_score", "learning_nats_per_token", "learning_flow_matching_loss"]
    assert re.findall(r'<figure id="(\w+)">', page) == drawn
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == set(drawn)
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    assert headings == [
        "What the intervals allow", "What this study does not show", "What was run", "Against compute",
        "Published numbers", "Fits", "Learning curves", "Samples at equal compute", "Costs", "What was lost",
        "Every point",
    ]  # fmt: skip
    assert "Which family learns most from a budget of compute?" in page
    assert "the loss of Autoregressive is below the upper bound of Cola DLM by" in page
    assert "2 shared" in page and "29%" in page  # stage 1 of Cola, charged to the smallest budget
    assert "3 published points, from 3.89e20 FLOPs on, lie beyond this picture" in page
    assert "Nothing: every point is in the fits." in page
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert len(rows) == 18 and rows[0]["point"] == "cola-1e12-s66" and float(rows[0]["model FLOPs"]) == 1e12
    assert json.loads((tmp_path / "fits.json").read_text())["study"] == "families"


@pytest.mark.filterwarnings("error")
def test_a_half_finished_study_has_a_page_that_names_what_is_missing(tmp_path, coarse_pictures):
    page = page_of(tmp_path, synthetic.half_finished())
    assert "21 of 24 points are in the fits; 1 failed, 1 running and 1 not begun" in page
    assert "failed: ran out of memory at step 12" in page and "llada-3e13-s67" in page


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_study_that_has_hardly_begun_has_a_page(tmp_path, coarse_pictures, left):
    found = synthetic.one_size()
    for row in found["rows"][left:]:
        row |= {"state": "not begun", "measures": {}, "samples": [], "curve": [], "compute": {}}
    page = page_of(tmp_path, found)
    assert f"{left} of 24 points are in the fits; {24 - left} not begun" in page
    assert "is left out: all runs are of one budget" in page if left else "Nothing yet" in page


@pytest.mark.filterwarnings("error")
def test_texts_of_a_model_do_no_harm(tmp_path, coarse_pictures):
    found = synthetic.axes()
    found["study"]["title"] = "<b>loc</b> & $x$"
    for row in found["rows"]:
        row["samples"] = [{"prompt": "p\u0000", "continuation": "<script>alert(1)</script>\ud800", "original": ""}]
    page = page_of(tmp_path, found)
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page and "&lt;b&gt;loc&lt;/b&gt;" in page
    assert "(empty)" in page and "\u2400" in page


@pytest.mark.filterwarnings("error")
def test_pictures_of_an_earlier_report_go(tmp_path, coarse_pictures):
    page_of(tmp_path, synthetic.several_sizes())
    before = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert {"isoflop_cola_dlm_all", "residuals_loss", "loss_against_model"} <= before
    (tmp_path / "figures" / "mine.png").write_bytes(b"")
    page_of(tmp_path, synthetic.axes())
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"axes_loss", "axes_score", "mine"}


# ---- figures --------------------------------------------------------------------------------------------------------


def nothing_overlaps(figure) -> None:
    """The legend lies on no axes and inside the figure, and no tick labels lie on each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    for axes in (each for each in figure.axes if each.get_visible()):
        assert axes.get_xlabel() and not box.overlaps(axes.get_tightbbox())
        low, high = sorted(axes.get_xlim())
        places = [
            label for label in axes.get_xticklabels() if label.get_text() and low <= label.get_position()[0] <= high
        ]
        boxes = [label.get_window_extent() for label in places]
        assert not any(left.overlaps(right) for left, right in itertools.pairwise(boxes))
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= -1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("make", [synthetic.one_size, synthetic.several_sizes, synthetic.axes, synthetic.half_finished])
def test_nothing_in_a_figure_lies_on_something_else(tmp_path, make):
    pytest.importorskip("matplotlib")
    study = Study(synthetic.write(tmp_path, make()))
    study.__dict__["_fits"] = fit_study(study.results, bootstrap=40)
    figures = study.figures()
    assert len(figures) >= 2
    for figure in figures.values():
        nothing_overlaps(figure)
        assert any(axes.get_ylabel() for axes in figure.axes)


def test_arms_are_told_apart_without_colour_and_stage_1_is_seen():
    pytest.importorskip("matplotlib")
    from cola_megatron.studies.report.figures import over_compute

    results = results_of(synthetic.one_size(budgets=(1e12, 3e12, 1e13)))
    fits = fit_study(results, bootstrap=40)
    for column, stage_one in (("model", True), ("nominal", False)):
        figure = over_compute(results, fits, "loss", column)
        (legend,) = figure.legends
        labels = [text.get_text() for text in legend.get_texts()]
        arms = ["Cola DLM (upper bound)", "Autoregressive", "LLaDA (upper bound)"]
        assert labels == [*arms, "stage 1 left out"] if stage_one else labels == arms
        looks = {(line.get_linestyle(), line.get_marker()) for line in legend.get_lines()[:3]}
        assert len(looks) == 3
        open_markers = [line for line in figure.axes[0].lines if line.get_markerfacecolor() == "white"]
        assert [len(line.get_xdata()) for line in open_markers] == ([6] if stage_one else [])


def test_published_points_stand_on_their_own_column_where_they_are_near():
    pytest.importorskip("matplotlib")
    from cola_megatron.studies.report.figures import over_compute, published_near

    found = synthetic.one_size(budgets=(1e12, 3e12, 1e13))
    found["study"]["published"].append({"arm": "cola", "column": "nominal", "compute": 5e13, "score": 0.2})
    results = results_of(found)
    near, far = published_near(results, "score", "nominal")
    assert [compute for compute, _ in near] == [5e13] and len(far) == 3
    assert published_near(results, "score", "model") == ([], [])
    figure = over_compute(results, fit_study(results, bootstrap=40), "score", "nominal")
    assert [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() == "*"] == [5e13]


def test_an_axis_study_marks_its_best():
    pytest.importorskip("matplotlib")
    from cola_megatron.reporting.figure_style import NothingToPlot
    from cola_megatron.studies.report.axis_figures import over_axes
    from cola_megatron.studies.report.figures import over_compute

    results = results_of(synthetic.axes(budgets=(3e12, 1e13)))
    fits = fit_study(results, bootstrap=40)
    figure = over_axes(results, fits.axes[0])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1", "1.7", "2.3"]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["latent size 16", "latent size 64", "latent size 128", "best"]
    (star,) = [line for line in figure.axes[0].lines if line.get_marker() == "*"]
    assert star.get_ydata()[0] == fits.axes[0].best.mean.value
    with pytest.raises(NothingToPlot, match="9 lines cannot be told apart"):
        over_compute(results, fits, "loss", "model")


# ---- samples, commands, notebook ------------------------------------------------------------------------------------


def test_samples_are_of_equal_compute_and_equal_prompts():
    found = synthetic.one_size()
    for row in found["rows"]:
        if row["budget"] == 3e13 and row["arm"] == "llada":
            row["samples"] = []
    shown = side_by_side(results_of(found))
    assert shown is not None and shown.budget == 1e13  # the largest at which all arms have written
    assert shown.points == ("cola-1e13-s66", "autoregressive-1e13-s66", "llada-1e13-s66")
    assert [writing.prompt for writing in shown.writings] == list(synthetic.PROMPTS)
    assert [writer for writer, _ in shown.writings[0].continuations] == ["Cola DLM", "Autoregressive", "LLaDA"]
    many = side_by_side(results_of(synthetic.axes()))
    assert many is not None and len(many.points) == 4 and len(many.left_out) == 5


def test_commands_say_where_they_wrote(tmp_path, coarse_pictures):
    folder = synthetic.write(tmp_path / "study", synthetic.axes())
    shown = cola_sweep("fit", folder)
    assert shown.splitlines()[-1] == str(folder / "fits.json")
    assert "not shown\n  - " in shown and "one budget, and a curve of three parameters needs at least 3" in shown
    shown = cola_sweep("plot", folder)
    assert shown.splitlines()[:2] == [str(folder / "figures" / f"axes_{name}.png") for name in ("loss", "score")]
    assert "left out: Nats per token against model FLOPs: all runs are of one budget" in shown
    shown = cola_sweep("report", folder)
    assert shown.splitlines()[-1] == str(folder / "report.html")
    assert re.search(r"^Cola DLM +1\.7 +64 +m +1e13 +1\.04e13 +2 +3\.9", shown, re.MULTILINE)
    found = json.loads(cola_sweep("report", folder, "--json"))
    assert found["page"] == str(folder / "report.html") and found["conclusions"][0]["is_shown"]
    assert json.loads(cola_sweep("plot", folder, "--json"))["left_out"]
    assert json.loads(cola_sweep("fit", folder, "--json"))["file"] == str(folder / "fits.json")


def test_a_study_in_a_notebook(tmp_path, coarse_pictures):
    study = Study(synthetic.write(tmp_path, synthetic.axes()))
    assert len(study.table) == 18 and study.table[0]["loc"] == "1"
    assert study.fits() is study.fits()
    assert sorted(study.figures()) == ["axes_loss", "axes_score"]
    assert study.conclusions()[0].is_shown
    assert study.write_report() == tmp_path / "report.html"
    with pytest.raises(UserError, match="there is no results"):
        Study(tmp_path / "elsewhere")


def test_without_matplotlib_one_line_names_the_extra(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("cola_megatron.reporting.", "matplotlib"))]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.endswith("_figures")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    study = Study(synthetic.write(tmp_path, synthetic.axes()))
    with pytest.raises(UserError, match="figures need matplotlib: make setup EXTRAS=report"):
        study.figures()
