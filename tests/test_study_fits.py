"""From the results of a study to its fits and sentences: what intervals allow, what they do not, what has no fit."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cola_megatron.errors import UserError
from cola_megatron.scaling import fit_loss_curve
from cola_megatron.scaling.loss_curve import curve
from cola_megatron.studies.report.arm_differences import differences
from cola_megatron.studies.report.conclusions import conclusions
from cola_megatron.studies.report.curve_fits import fit_curve
from cola_megatron.studies.report.fits import fit_study
from cola_megatron.studies.report.fits_file import as_json, write_fits
from cola_megatron.studies.report.series import series_of
from cola_megatron.studies.results import read_results, results_of
from cola_megatron.studies.rows import table
from cola_megatron.studies.words import number
from tests import synthetic_studies as synthetic

LAW = (2.0, 1000.0, 0.25)
BUDGETS = np.repeat(np.geomspace(1e12, 1e14, 4), 2)


def losses(noise: float, seed: int = 0, law: tuple[float, float, float] = LAW) -> np.ndarray:
    return curve(law, BUDGETS) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(BUDGETS)))


# ---- the loss curve -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [LAW, (0.0, 1000.0, 0.2), (3.0, 5e5, 0.5), (1.0, 30.0, 0.05)])
def test_without_noise_the_curve_comes_back(law):
    fit = fit_loss_curve(BUDGETS, losses(0, law=law), bootstrap=20)
    assert (fit.E, fit.alpha) == pytest.approx((law[0], law[2]), rel=1e-4, abs=1e-4)
    assert np.abs(fit.residuals).max() < 1e-7
    assert fit.compute_to_reach(float(fit.loss(2e13)))[0] == pytest.approx(2e13, rel=1e-6)
    assert fit.compute_to_reach(law[0] * 0.9)[0] == np.inf


def test_intervals_of_the_curve_and_of_a_further_run_contain_the_truth_in_90_of_100_studies():
    held = {"E": 0, "A": 0, "alpha": 0, "a further run": 0}
    for draw in range(100):
        fit = fit_loss_curve(BUDGETS, losses(0.005, draw), seed=draw)
        for name, true in zip(("E", "A", "alpha"), LAW, strict=True):
            held[name] += true in fit.intervals[name]
        further = curve(LAW, 3e14) * np.exp(0.005 * np.random.default_rng(1000 + draw).standard_normal())
        held["a further run"] += float(further) in fit.predict(3e14, single_run=True).interval
    assert min(held.values()) >= 90, held


def test_the_order_of_the_points_changes_nothing_and_the_seed_does():
    order = np.random.default_rng(1).permutation(len(BUDGETS))
    one = fit_loss_curve(BUDGETS, losses(0.01), seed=3)
    other = fit_loss_curve(BUDGETS[order], losses(0.01)[order], seed=3)
    assert one.intervals == other.intervals
    assert one.residuals[order] == pytest.approx(other.residuals, abs=0)
    assert one.intervals != fit_loss_curve(BUDGETS, losses(0.01), seed=4).intervals


def test_noise_that_two_fits_share_is_gone_from_the_difference_of_paired_samples():
    pairs = [f"{budget:.3g} {place % 2}" for place, budget in enumerate(BUDGETS)]
    widths = {}
    for name, ids in (("paired", pairs), ("other ids", [f"{each} other" for each in pairs])):
        first = fit_loss_curve(BUDGETS, losses(0.01), pairs=pairs, bootstrap=400)
        second = fit_loss_curve(BUDGETS, 1.1 * losses(0.01), pairs=ids, bootstrap=400)
        widths[name] = np.std(second.samples(3e13)[:, 0] / first.samples(3e13)[:, 0])
    assert widths["paired"] < 1e-6
    assert widths["other ids"] > 1e-3


@pytest.mark.parametrize(
    ("compute", "seen", "words"),
    [
        ([1e12, 1e13, 1e14], [4.0, 3.5, 3.2], "3 runs of 3 budgets are too few"),
        ([1e12, 1e12, 1e13, 1e13], [4.0, 4.1, 3.5, 3.6], "4 runs of 2 budgets are too few"),
        ([1e12, 2e12, 4e12, -1.0], [4.0, 3.5, 3.2, 3.0], "compute: entry 3 is -1"),
        ([1e12, 2e12, 4e12, 8e12], [4.0, 3.5, 3.2], "4 compute, 3 losses"),
    ],
)
def test_what_is_no_curve_is_refused_by_name(compute, seen, words):
    with pytest.raises(ValueError, match=words):
        fit_loss_curve(compute, seen)


def test_a_loss_that_does_not_fall_has_no_exponent():
    fit = fit_loss_curve(BUDGETS, np.linspace(3, 3.2, len(BUDGETS)), bootstrap=20)
    assert fit.at_bound == ("A", "alpha")


# ---- results.json ---------------------------------------------------------------------------------------------------


def damaged(change) -> str:
    found = synthetic.one_size()
    change(found)
    return json.dumps(found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no JSON"),
        ("[]", "the file: must be an object"),
        (damaged(lambda found: found.pop("rows")), "rows: must be a list"),
        (damaged(lambda found: found["rows"][2].update(arm="plaid")), "its arm 'plaid' is none of the study's"),
        (damaged(lambda found: found["rows"][2].update(point=found["rows"][1]["point"])), "there are two points"),
        (damaged(lambda found: found["rows"][0].update(tokens="many")), "tokens must be a number, and is 'many'"),
        (damaged(lambda found: found["rows"][0].update(curve=[[1, 2]])), r"curve: \[1, 2\] is no step, name and value"),
        (damaged(lambda found: found["rows"][0].update(measures={"x": 3})), "measures.x: must be an object"),
        (damaged(lambda found: found["study"].update(budget_column="flops")), "budget_column: 'flops' is none of"),
        (damaged(lambda found: found["rows"][0].update(budget=float("nan"))), "budget must be a number"),
    ],
)
def test_damaged_results_are_refused_in_a_line_that_names_the_cure(tmp_path, text, words):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=words) as refused:
        read_results(tmp_path)
    assert "cola sweep collect" in str(refused.value) and "\n" not in str(refused.value)


def test_a_folder_without_results_says_how_to_get_them(tmp_path):
    with pytest.raises(UserError, match=r"there is no results\.json; `cola sweep collect"):
        read_results(tmp_path)


def test_fits_have_the_finished_rows_and_what_is_lost_is_named():
    results = results_of(synthetic.half_finished())
    lost = {each.point: each.why for each in results.not_fitted()}
    assert lost == {
        "cola-3e12-s67": "failed: ran out of memory at step 12",
        "cola-3e13-s67": "running",
        "llada-3e13-s67": "not begun",
    }
    assert len(results.finished()) == 21 and not {row.point for row in results.finished()} & set(lost)
    lines = table(results)
    assert len(lines) == 24
    assert {line["state"] for line in lines} == {"finished", "failed", "running", "not begun"}
    first = lines[0]
    assert (first["arm"], first["loss_kind"], first["model FLOPs of stage 1"]) == ("cola", "bound", synthetic.STAGE_ONE)


# ---- fits of a study ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def families():
    """Three arms, four budgets, two seeds; the laws are known. Scores have tests of their own, as they take longer."""
    found = synthetic.one_size(draw=1)
    found["study"]["fit"]["score"] = None
    results = results_of(found)
    return results, fit_study(results)


def test_laws_of_the_arms_lie_in_their_intervals(families):
    _, fits = families
    (plain,) = (fit for fit in fits.of("loss", "model") if fit.series.arm == "autoregressive")
    for name, true in zip(("E", "alpha"), (2.2, 0.26), strict=True):
        assert true in plain.curve.intervals[name]
    # Column by column the same runs, at the cost of the column.
    assert {fit.column for fit in fits.curves} == {"nominal", "model", "hardware"}
    cola = next(fit for fit in fits.of("loss", "model") if fit.series.arm == "cola")
    assert min(cola.compute) == pytest.approx(1e12 + synthetic.STAGE_ONE)
    assert cola.notes == ("stage 1 is 1 to 29% of the FLOPs, which bends the curve",)
    nominal = next(fit for fit in fits.of("loss", "nominal") if fit.series.arm == "cola")
    assert min(nominal.compute) == pytest.approx(0.8e12) and nominal.notes == ()


def test_arms_are_compared_within_the_runs_of_both(families):
    _, fits = families
    chosen = [each for each in fits.differences if each.column == "model" and each.first.series.arm == "cola"]
    last = next(each for each in reversed(chosen) if each.second.series.arm == "autoregressive")
    # At 3e13 FLOPs with the stage 1 of Cola in them.
    E, A, alpha = synthetic.LAWS["cola"]
    true = E + A / (3e13 - synthetic.STAGE_ONE) ** alpha - float(curve(synthetic.LAWS["autoregressive"], 3e13))
    assert last.compute == pytest.approx(3e13)
    assert last.value.low <= true <= last.value.high
    assert last.excludes_zero and not last.is_of_one_kind
    # Cola's is a bound above the exact loss: its own loss may be lower.
    assert not last.is_shown
    assert min(each.compute for each in chosen) >= 1e12 + synthetic.STAGE_ONE


def test_noise_that_arms_share_leaves_the_difference_and_is_not_taken_for_granted():
    widths = {}
    for shared in (True, False):
        found = synthetic.one_size(noise=0.01, shared=shared)
        found["study"]["fit"]["score"] = None
        for row in found["rows"]:
            row["stage_one_compute"] = {}
        fits = fit_study(results_of(found), bootstrap=200)
        last = next(each for each in reversed(fits.differences) if each.column == "model")
        assert last.how == ("curves, paired" if shared else "curves")
        widths[shared] = last.value.high - last.value.low
    assert widths[True] < 0.5 * widths[False]


def test_intervals_of_a_difference_hold_the_truth_in_90_of_100_studies():
    held = 0
    for draw in range(100):
        found = synthetic.one_size(draw=draw)
        results = results_of(found)
        by_arm = {series.arm: series for series in series_of(results)}
        fitted = [fit_curve(results, by_arm[arm], "loss", "model", 100, draw) for arm in ("autoregressive", "llada")]
        last = differences(results, *fitted)[-1]
        true = [float(curve(synthetic.LAWS[arm], last.compute)) for arm in ("autoregressive", "llada")]
        held += last.value.low <= true[0] - true[1] <= last.value.high
    assert held >= 90


def test_a_bound_below_an_exact_loss_shows_that_the_loss_is(families):
    found = synthetic.one_size()
    found["study"]["fit"]["score"] = None
    for row in found["rows"]:
        kind = "bound" if row["arm"] == "autoregressive" else "exact"
        row["measures"]["nats_per_token"]["kind"] = kind
    results = results_of(found)
    fits = fit_study(results, bootstrap=60)
    assert all(each.is_shown for each in fits.differences if "autoregressive" in each.second.series.arm)
    said = [each.text for each in conclusions(results, fits) if each.is_shown]
    assert any("the upper bound of Autoregressive is below the loss of Cola DLM" in text for text in said)
    assert any("so its loss is lower still" in text for text in said)


def test_compute_to_reach_the_same_loss(families):
    _, fits = families
    found = {
        (each.first.series.arm, each.second.series.arm): each for each in fits.ratios if each.first.column == "nominal"
    }
    ahead = found["llada", "autoregressive"]
    E, A, alpha = synthetic.LAWS["autoregressive"]
    true = (A / (float(curve(synthetic.LAWS["llada"], 3e13)) - E)) ** (1 / alpha) / 3e13
    assert ahead.ratio.value == pytest.approx(true, rel=0.1)
    assert ahead.ratio.low < ahead.ratio.value < ahead.ratio.high < 0.2
    behind = found["autoregressive", "llada"]
    assert behind.ratio is None and behind.why == "not reached"


def test_exponents_are_compared_where_stage_1_is_not_in_the_compute(families):
    _, fits = families
    columns = {}
    for each in fits.exponents:
        columns.setdefault((each.first.series.arm, each.second.series.arm), set()).add(each.first.column)
    assert columns["cola", "autoregressive"] == {"nominal"}
    assert columns["autoregressive", "llada"] == {"nominal", "model", "hardware"}


def test_the_largest_budget_is_predicted_from_the_smaller_ones(families):
    results, fits = families
    for fit in fits.of("loss", "model"):
        assert [each.point[-8:] for each in fit.check] == ["3e13-s66", "3e13-s67"]
    line = str(fits.of("loss", "model")[0].check[0])
    assert re.fullmatch(
        r"cola-3e13-s66 at 3\.04e13 FLOPs: predicted 3\.1\d+ \(\S+ to \S+\), seen 3\.0\d+, (in|out)side the interval",
        line,
    )
    said = [each.text for each in conclusions(results, fits)]
    assert any("The largest budget was predicted within its interval" in text for text in said)


def test_the_order_of_the_rows_changes_nothing():
    found = synthetic.one_size(budgets=(1e12, 3e12, 1e13))
    found["study"]["fit"]["score"] = None
    shuffled = json.loads(json.dumps(found))
    random.Random(0).shuffle(shuffled["rows"])
    one, other = (as_json(each, fit_study(each, bootstrap=40)) for each in map(results_of, (found, shuffled)))
    assert one == other


def test_what_cannot_be_fitted_is_said_in_words():
    found = synthetic.one_size(budgets=(1e12, 1e13))
    for row in found["rows"]:
        row["measures"]["last_word"] = {"value": 0.0, "error": 0.0, "items": 200}
    results = results_of(found)
    fits = fit_study(results, bootstrap=40)
    assert {fit.cannot for fit in fits.curves} == {"2 budgets, and a curve of three parameters needs at least 3"}
    # Losses are then compared by the runs of a budget, on the columns where it costs the arms the same.
    assert {(each.how, each.column) for each in fits.differences if each.first.series.arm == "cola"} == {
        ("runs", "nominal"),
        ("runs", "model"),
        ("runs", "hardware"),
    }
    assert all(
        each.compute > 5e12 for each in fits.differences if each.first.series.arm == "cola" and each.column == "model"
    )
    said = [each.text for each in conclusions(results, fits)]
    assert any(text.startswith("No curve of loss is fitted to Cola DLM, Autoregressive and LLaDA: ") for text in said)
    assert any("Cola DLM does not leave chance (0) in last word: 0 (0" in text for text in said)
    assert not any(each.quantity == "score" for each in fits.differences)


def test_scores_that_are_all_alike_have_no_curve():
    found = synthetic.one_size(budgets=(1e12, 3e12, 1e13))
    for row in found["rows"]:
        row["measures"]["last_word"] = {"value": 0.0, "error": 0.0, "items": 200}
    fits = fit_study(results_of(found), bootstrap=40)
    assert {fit.cannot for fit in fits.of("score", "model")} == {
        "scores: every run has 0, so there is no curve; fit a task on which runs differ"
    }
    assert all(fit.curve is not None for fit in fits.of("loss", "model"))
    assert all("needs at least 4" in fit.no_check for fit in fits.of("loss", "model"))


def test_scores_against_compute_are_compared_and_checked():
    found = synthetic.one_size()
    found["rows"] = [row for row in found["rows"] if row["arm"] != "cola"]
    for row in found["rows"]:
        row["compute"] = {"model": row["compute"]["model"]}
        row["measures"]["last_word"]["value"] *= 1.0 if row["arm"] == "llada" else 0.5
    results = results_of(found)
    fits = fit_study(results, bootstrap=100)
    (last,) = [each for each in fits.differences if each.quantity == "score"][-1:]
    assert last.is_shown and last.value.value < 0 and last.how == "curves"
    said = [each.text for each in conclusions(results, fits) if each.is_shown]
    assert any(
        text.startswith("At 3e13 FLOPs (model) LLaDA is above Autoregressive in last word by 0.") for text in said
    )
    assert all(len(fit.check) == 2 for fit in fits.of("score", "model"))


# ---- several sizes --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sizes():
    results = results_of(synthetic.several_sizes())
    return results, fit_study(results, bootstrap=200)


def test_several_sizes_have_a_surface_under_each_definition(sizes):
    _, fits = sizes
    assert [(fit.series.arm, fit.definition) for fit in fits.surfaces] == [
        ("cola", "without embeddings"),
        ("cola", "all"),
        ("autoregressive", "without embeddings"),
        ("autoregressive", "all"),
    ]
    planned_by = fits.surfaces[2]
    assert 0.5 in planned_by.surface.intervals["a"]
    # Of each budget 6 N D, which the generator has made the budget itself under this definition.
    assert [profile.compute for profile in planned_by.profiles] == pytest.approx([1e12, 4e12, 1.6e13])
    assert [len(planned_by.check.runs), planned_by.check.inside] == [6, 6]
    # Runs of a trunk are drawn together, as there are six trunks of an arm.
    assert planned_by.notes == ()
    curves = fits.of("loss", "model")
    assert all("through the best of several sizes at each budget" in fit.notes for fit in curves)
    assert all(len(fit.rows) == 6 for fit in curves)


def test_two_sizes_have_no_surface_and_that_is_said():
    results = results_of(synthetic.several_sizes(sizes=2))
    fits = fit_study(results, bootstrap=40)
    assert {fit.cannot for fit in fits.surfaces} == {"2 sizes, and a surface needs at least 3"}
    said = [each.text for each in conclusions(results, fits)]
    assert any("No surface is fitted to Cola DLM (N all): 2 sizes" in text for text in said)


# ---- axes -----------------------------------------------------------------------------------------------------------


def test_the_best_setting_and_those_it_cannot_be_told_from():
    results = results_of(synthetic.axes())
    fits = fit_study(results)
    loss, score = fits.axes
    assert (loss.quantity, score.quantity, len(loss.cells)) == ("loss", "score", 9)
    assert dict(loss.best.settings) == {"loc": "2.3", "latent": "128"}
    # The spread is pooled: nine repeats of two seeds.
    assert loss.spread.freedom == 9 and 0.01 < loss.spread.deviation < 0.04
    assert {cell.title for cell, _ in loss.against} - {cell.title for cell in loss.beaten} == {
        "loc of flow times 1.7, latent size 128"
    }
    said = conclusions(results, fits)
    shown = [each.text for each in said if each.is_shown]
    assert shown[0].startswith(
        "At 1e13 FLOPs loc of flow times 2.3, latent size 128 has the lowest nats per token, 3.90 ("
    )
    assert "set it apart from 7 of the 8 other settings" in shown[0]
    others = [each.text for each in said if not each.is_shown]
    assert any(
        "is better than loc of flow times 1.7, latent size 128 in nats per token is not shown" in e for e in others
    )
    assert any(text.startswith("All points are of one budget, 1e13 FLOPs") for text in others)


def test_a_single_seed_says_that_its_intervals_are_of_the_measurement():
    results = results_of(synthetic.axes(seeds=(66,)))
    fits = fit_study(results)
    assert fits.axes[0].spread.deviation is None
    said = [each.text for each in conclusions(results, fits)]
    assert any(text.startswith("No setting was run with two seeds at 1e13 FLOPs") for text in said)


# ---- sentences ------------------------------------------------------------------------------------------------------


def test_sentences_follow_the_numbers():
    results = results_of(synthetic.half_finished())
    fits = fit_study(results, bootstrap=60)
    said = conclusions(results, fits)
    texts = [each.text for each in said]
    assert [each.is_shown for each in said] == sorted((each.is_shown for each in said), reverse=True)
    assert len(set(texts)) == len(texts)
    assert "3 of 24 points (12%) are in no fit: cola-3e12-s67, cola-3e13-s67 and llada-3e13-s67." in texts
    assert any(
        text.startswith("Losses of Cola DLM and LLaDA are upper bounds, those of Autoregressive") for text in texts
    )
    assert any("2 seeds cannot show a difference in loss below" in text for text in texts)
    assert any("decades below the published 1.95e21 FLOPs" in text for text in texts)


def test_an_empty_study_has_no_sentence_that_shows_anything():
    found = synthetic.one_size()
    for row in found["rows"]:
        row |= {"state": "not begun", "measures": {}}
    results = results_of(found)
    said = conclusions(results, fit_study(results))
    (text,) = (each.text for each in said)
    assert text.startswith("24 of 24 points (100%) are in no fit: cola-1e12-s66, ") and text.endswith(" and 20 others.")
    assert not said[0].is_shown


def test_fits_are_written_for_a_script(tmp_path):
    folder = synthetic.write(tmp_path / "study", synthetic.axes())
    path = write_fits(folder)
    assert path == folder / "fits.json"
    found = json.loads(path.read_text())
    assert set(found) == {
        "study", "scale", "curves", "surfaces", "differences", "compute_ratios", "exponent_differences", "axes",
        "conclusions", "lost",
    }  # fmt: skip
    assert found["axes"][0]["best"] == {"loc": "2.3", "latent": "128"}
    assert found["curves"][0]["cannot"].startswith("one budget")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.312, "0.312"),
        (1e13, "1e13"),
        (3.04e13, "3.04e13"),
        (0, "0"),
        (1234.5, "1,234"),
        (8.2e-5, "8.2e-5"),
        (float("nan"), "-"),
    ],
)
def test_numbers_in_words(value, words):
    assert number(value) == words


def test_a_study_needs_neither_torch_nor_matplotlib(tmp_path):
    folder = synthetic.write(tmp_path, synthetic.axes())
    code = (
        "import sys; sys.modules['matplotlib'] = None; from cola_megatron.scaling import Study; "
        f"s = Study({str(folder)!r}); print(len(s.table), len(s.conclusions()), 'torch' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.split()[0] == "18" and done.stdout.split()[2] == "False"
