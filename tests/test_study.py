"""A study file: what it expands into, what is refused, and its folder."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from cola_megatron.config import ConfigError, dump_config
from cola_megatron.planning.compute import compute_of
from cola_megatron.records.goodput import begin_attempt
from cola_megatron.records.json_files import write_json
from cola_megatron.studies.collect import collect
from cola_megatron.studies.expansion import expand
from cola_megatron.studies.folder import INDEX, StudyFolder
from cola_megatron.studies.study_file import load_study
from launchers.sweep_files import study_file
from launchers.sweep_jobs import jobs_of
from launchers.sweep_plan import shares_of

SHIPPED = sorted(path.stem for path in (Path(__file__).parents[1] / "launchers" / "sweeps").glob("*.yaml"))
SMALL: dict[str, Any] = {
    "name": "small",
    "arms": {
        "cola": {
            "config": "tiny",
            "stage_one": {
                "training.steps": 10,
                "training.schedule.decay_steps": 10,
                "training.schedule.warmup_steps": 1,
            },
        },
        "ar": {"config": "tiny-autoregressive"},
    },
    "overrides": {"training.schedule.warmup_steps": 2, "training.micro_batch_size": 8},
    "budgets": {"column": "steps", "amounts": [20, 40]},
    "seeds": [1, 2],
    "data": {"path": "data"},
}


def write(folder: Path, over: dict[str, Any] | None = None, base: dict[str, Any] = SMALL) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**base, **(over or {})}, sort_keys=False))
    return path


def expanded(folder: Path, over: dict[str, Any] | None = None, scale: str | None = None):
    return expand(load_study(write(folder, over), scale), folder / "out")


# ---- expansion ------------------------------------------------------------------------------------------------------


def test_every_arm_budget_and_seed_is_a_run_and_stage_one_is_shared_by_the_budgets(tmp_path):
    found = expanded(tmp_path)
    assert list(found.runs) == [
        *("cola-stage1-s1", "cola-20-s1", "cola-40-s1", "cola-stage1-s2", "cola-20-s2", "cola-40-s2"),
        *("ar-20-s1", "ar-40-s1", "ar-20-s2", "ar-40-s2"),
    ]
    run = found.runs["cola-40-s2"]
    assert run.needs == ("cola-stage1-s2",)
    assert run.config.training.stage_one == found.runs["cola-stage1-s2"].config.run_folder
    assert (run.config.seed, run.config.training.steps, run.config.training.schedule.decay_steps) == (2, 40, 40)
    assert run.config.run_folder == tmp_path / "out" / "runs" / "cola-40-s2"
    point = next(point for point in found.points if point.name == "cola-40-s2")
    assert (point.arm, point.seed, point.budget, point.step, point.stage_one) == ("cola", 2, 40, 40, "cola-stage1-s2")


def test_branches_start_where_their_decay_begins(tmp_path):
    budgets = {"column": "steps", "amounts": [20, 40], "runs": "branches", "decay_share": 0.25, "warmup_share": 0.1}
    found = expanded(tmp_path, {"budgets": budgets, "seeds": [1]})
    trunk, short, long = (found.runs[name].config.training for name in ("ar-trunk-s1", "ar-20-s1", "ar-40-s1"))
    assert (trunk.steps, trunk.schedule.decay_from, trunk.checkpoint.at) == (30, 30, (15, 30))
    assert (short.steps, short.schedule.decay_from, short.schedule.decay_steps) == (20, 15, 20)
    assert str(short.start_from).endswith("ar-trunk-s1/checkpoints/step_00000015")
    assert str(long.start_from).endswith("ar-trunk-s1/checkpoints/step_00000030")
    assert {each.schedule.warmup_steps for each in (trunk, short, long)} == {2}
    assert found.runs["cola-40-s1"].needs == ("cola-trunk-s1",)
    assert found.runs["cola-trunk-s1"].needs == ("cola-stage1-s1",)


def test_budgets_may_be_checkpoints_of_one_run(tmp_path):
    found = expanded(
        tmp_path, {"budgets": {"column": "steps", "amounts": [20, 40], "runs": "checkpoints"}, "seeds": [1]}
    )
    assert list(found.runs) == ["cola-stage1-s1", "cola-s1", "ar-s1"]
    assert found.runs["ar-s1"].config.training.checkpoint.at == (20, 40)
    assert [(point.run, point.step) for point in found.points if point.arm == "ar"] == [("ar-s1", 20), ("ar-s1", 40)]


def test_a_budget_in_flops_pays_for_stage_one_unless_it_is_said_otherwise(tmp_path):
    budgets = {"column": "model", "amounts": [1e13]}
    paid = expanded(tmp_path, {"budgets": budgets})
    free = expanded(tmp_path, {"budgets": {**budgets, "with_stage_one": False}})
    run, first = paid.runs["cola-1e13-s1"].config, paid.runs["cola-stage1-s1"].config
    spent = compute_of(first, first.training.steps)["model"]
    assert compute_of(run, run.training.steps)["model"] + spent == pytest.approx(1e13, rel=0.01)
    longer = free.runs["cola-1e13-s1"].config
    assert compute_of(longer, longer.training.steps)["model"] == pytest.approx(1e13, rel=0.01)
    assert longer.training.steps > run.training.steps


def test_axes_make_a_grid_and_only_some_of_them_concern_stage_one(tmp_path):
    axes = {
        "dim": {
            "varies": "both_stages",
            "arms": ["cola"],
            "settings": {
                "8": {"model.vae.latent_dim": 8, "model.dit.latent_dim": 8},
                "16": {"model.vae.latent_dim": 16, "model.dit.latent_dim": 16},
            },
        },
        "loc": {
            "arms": ["cola"],
            "settings": {"0": {"objective.flow.time.loc": 0}, "1": {"objective.flow.time.loc": 1}},
        },
        "steps": {"varies": "generation", "arms": ["cola"], "settings": {"4": {"steps": 4}, "8": {"steps": 8}}},
    }
    found = expanded(tmp_path, {"axes": axes, "seeds": [1], "budgets": {"column": "steps", "amounts": [20]}})
    assert [run.name for run in found.runs.values() if run.role == "stage_one"] == [
        "cola-dim8-stage1-s1",
        "cola-dim16-stage1-s1",
    ]
    assert [run.name for run in found.runs.values() if run.role == "run"] == [
        *("cola-dim8-loc0-20-s1", "cola-dim8-loc1-20-s1", "cola-dim16-loc0-20-s1", "cola-dim16-loc1-20-s1"),
        "ar-20-s1",
    ]
    points = [point for point in found.points if point.run == "cola-dim16-loc1-20-s1"]
    assert [(point.settings["steps"], point.generation) for point in points] == [
        ("4", {"steps": 4}),
        ("8", {"steps": 8}),
    ]
    assert len({point.measured_as for point in points}) == 2


def test_arms_that_share_a_stage_one_train_it_once(tmp_path):
    arms = {**SMALL["arms"], "slow": {**SMALL["arms"]["cola"], "overrides": {}}}
    axes = {"rate": {"arms": ["slow"], "settings": {"low": {"training.vae_update.learning_rate_ratio": 0.5}}}}
    found = expanded(tmp_path, {"arms": arms, "axes": axes, "seeds": [1]})
    assert [run.name for run in found.runs.values() if run.role == "stage_one"] == ["cola-stage1-s1"]
    assert found.runs["slow-ratelow-20-s1"].needs == ("cola-stage1-s1",)


@pytest.mark.parametrize("kind", ["own", "branches", "checkpoints"])
def test_a_setting_that_two_axes_have_in_common_is_one_run_and_a_row_of_each(kind, tmp_path):
    arms = {name: {"config": "tiny-autoregressive"} for name in ("rate", "seed")}
    axes = {
        "rate": {"arms": ["rate"], "settings": {"own": {}, "low": {"training.optimizer.learning_rate": 1e-3}}},
        "order": {"arms": ["seed"], "settings": {"own": {}, "other": {"data.seed": 1}}},
    }
    budgets = {"column": "steps", "amounts": [20, 40], "runs": kind, "warmup_share": 0.1}
    over = {"arms": arms, "axes": axes, "seeds": [1], "budgets": budgets}
    found = expanded(tmp_path, over)
    assert all(need in found.runs for run in found.runs.values() for need in run.needs)
    of_rate, of_order = ([p for p in found.points if p.settings == {axis: "own"}] for axis in ("rate", "order"))
    assert [(p.run, p.trunk, p.measured_as) for p in of_rate] == [(p.run, p.trunk, p.measured_as) for p in of_order]
    assert {point.run for point in of_rate} <= found.runs.keys() and len(found.points) == 8
    measures = [job for job in jobs_of(begun(tmp_path, over)).values() if job.kind == "measure"]
    assert len(measures) == 6, "what is common is measured once"


def test_arms_of_one_run_that_are_measured_differently_are_measured_apart(tmp_path):
    arms = {
        "few": {**SMALL["arms"]["cola"], "generation": {"steps": 4}},
        "many": {**SMALL["arms"]["cola"], "generation": {"steps": 8}},
        "drawn": {**SMALL["arms"]["cola"], "generation": {"steps": 8}, "likelihood": {"samples": 2}},
    }
    found = expanded(tmp_path, {"arms": arms, "seeds": [1], "budgets": {"column": "steps", "amounts": [20]}})
    assert {point.run for point in found.points} == {"few-20-s1"}
    assert len({point.measured_as for point in found.points}) == 3


def test_rules_set_rate_and_batch_of_every_run(tmp_path):
    over = {
        "learning_rate": {"rule": "power_law", "of": "tokens", "coefficient": 1e-3, "exponent": -0.5, "reference": 1e5},
        "batch": {"rule": "power_law", "of": "tokens", "coefficient": 2048, "exponent": 0.5, "reference": 1e5},
        "budgets": {"column": "tokens", "amounts": [1e5, 4e5]},
        "seeds": [1],
    }
    found = expanded(tmp_path, {**over, "arms": {"ar": {"config": "tiny-autoregressive"}}})
    short, long = (found.runs[name].config for name in ("ar-1e05-s1", "ar-4e05-s1"))
    assert (short.training.global_batch_size, long.training.global_batch_size) == (16, 32)
    assert short.training.optimizer.learning_rate == pytest.approx(2 * long.training.optimizer.learning_rate, rel=0.02)
    said = [line.partition(": ")[0] for line in found.decisions]
    assert said == ["ar, budget 1e+05", "ar, budget 1e+05", "ar, budget 4e+05", "ar, budget 4e+05"]
    assert "training.global_batch_size=16" in found.decisions[0]
    assert "training.optimizer.learning_rate=" in found.decisions[1]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_studies_expand_at_every_scale(name, tmp_path):
    path = study_file(name)
    scales = yaml.safe_load(path.read_text())["scales"]
    assert "tiny" in scales
    for scale in (None, *scales):
        study = load_study(path, scale)
        found = expand(study, tmp_path)
        assert {point.arm for point in found.points} == set(study.arms)
        jobs = jobs_of(StudyFolder(tmp_path, study))
        assert all(need in jobs for job in jobs.values() for need in job.needs)


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"seeds": [1, 1]}, "one stands twice, which would be two equal runs"),
        ({"arms": {"a": {"config": "tiny"}, "b": {"config": "tiny"}}}, "b-20-s1 and a-20-s1 are two equal runs"),
        ({"axes": {"x": {"settings": {"1": {"objective.flow.tim.loc": 1}}}}}, "unknown key"),
        ({"axes": {"x": {"settings": {"a": {}, "b": {}}}}}, "two equal runs"),
        ({"axes": {"x": {"settings": {"a/b": {}, "a+b": {"data.seed": 1}}}}}, "two runs have the name"),
        ({"budgets": {"column": "tokens", "amounts": [100]}}, "is below one step"),
        ({"overrides": {"training.schedule.warmup_steps": 30}}, "budgets.warmup_share sets it for every length"),
        ({"budgets": {"column": "tokens", "amounts": [10_000]}}, "from the nearest whole number of steps"),
        ({"budgets": {"column": "steps", "amounts": [20, 20.1]}}, "two budgets are 20 steps each"),
        (
            {"budgets": {"column": "steps", "amounts": [12341, 12342], "runs": "checkpoints"}},
            "two points have the name",
        ),
        ({"budgets": {"column": "model", "amounts": [1e10]}}, "stage 1 (cola-stage1-s1) alone takes"),
        ({"axes": {"x": {"arms": ["llama"], "settings": {"1": {}}}}}, "axes.x names the arm llama"),
        ({"data": {}}, "data needs one of path and source"),
        ({"published": [{"arm": "ar", "compute": 1e9}]}, "the point of ar at 1e+09 FLOPs has neither score nor loss"),
        ({"measures": {"tasks": ["lambada"]}}, "measures needs tasks and benchmarks together"),
        ({"arms": {"a": {"config": "tinny"}}}, "a: tinny: neither a config file nor one of the presets"),
        ({"budget": {}}, "unknown key; did you mean budgets?"),
    ],
)
def test_what_makes_no_study_is_refused_in_one_line(over, message, tmp_path):
    with pytest.raises(ConfigError) as refused:
        expanded(tmp_path, over)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_an_unknown_scale_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(ConfigError, match="has no scale huge; its scales are published, tiny"):
        expanded(tmp_path, {"scales": {"tiny": {}}}, "huge")


def test_an_unknown_study_is_refused_with_those_there_are():
    with pytest.raises(
        ConfigError, match="rq9: neither a study file nor one of the studies ladder, optimizer, rq1, rq2"
    ):
        study_file("rq9")


def test_a_scale_lies_over_the_rest_and_null_takes_out(tmp_path):
    scales = {"half": {"arms": {"cola": None}, "budgets": {"amounts": [10]}, "overrides": {"seed": None}}}
    study = load_study(write(tmp_path, {"scales": scales}), "half")
    assert (list(study.arms), study.budgets.amounts, study.budgets.column) == (["ar"], [10], "steps")


def test_numbers_of_an_axis_ascend_where_a_scale_adds_some(tmp_path):
    settings = {label: {"data.seed": int(label)} for label in ("16", "64", "128")}
    scales = {"less": {"axes": {"x": {"settings": {"4": {"data.seed": 4}, "128": None}}}}}
    study = load_study(write(tmp_path, {"axes": {"x": {"settings": settings}}, "scales": scales}), "less")
    assert list(study.axes["x"].settings) == ["4", "16", "64"]


# ---- folder ---------------------------------------------------------------------------------------------------------


def begun(tmp_path: Path, over: dict[str, Any] | None = None) -> StudyFolder:
    return StudyFolder.begin(tmp_path / "out", load_study(write(tmp_path, over)))


def finish(opened: StudyFolder, name: str) -> None:
    opened.prepare(opened.expanded.runs[name])
    (opened.run_folder(name) / "config.yaml").write_text(dump_config(opened.expanded.runs[name].config))
    write_json(opened.run_folder(name) / "summary.json", {"finished": True})


def test_a_folder_takes_more_runs_but_no_others(tmp_path):
    finish(begun(tmp_path), "ar-20-s1")
    assert "ar-80-s1" in begun(tmp_path, {"budgets": {"column": "steps", "amounts": [20, 80]}}).expanded.runs
    with pytest.raises(ConfigError, match=r"ar-20-s1 was begun with training\.optimizer\.learning_rate=0\.002"):
        begun(tmp_path, {"overrides": {**SMALL["overrides"], "training.optimizer.learning_rate": 1e-3}})
    with pytest.raises(ConfigError, match="has a run ar-20-s1, and this study has none"):
        begun(tmp_path, {"seeds": [3]})
    with pytest.raises(ConfigError, match="is of the study small at scale published, not of other"):
        begun(tmp_path, {"name": "other"})
    assert StudyFolder.open(tmp_path / "out").study.seeds == [1, 2], "nothing was overwritten"


def test_a_run_that_has_not_begun_may_still_change(tmp_path):
    finish(begun(tmp_path), "ar-20-s1")
    axes = {"rate": {"arms": ["cola"], "settings": {"low": {"training.optimizer.learning_rate": 1e-3}}}}
    assert "cola-ratelow-20-s1" in begun(tmp_path, {"axes": axes}).expanded.runs


def test_a_killed_run_is_said_to_have_been_killed(tmp_path):
    opened = begun(tmp_path)
    folder = opened.prepare(opened.expanded.runs["ar-20-s1"]).parent
    (folder / "log.txt").write_text("")
    assert opened.state_of("ar-20-s1") == "not begun", "its process is on its way"
    (folder / "log.txt").write_text("step 12 loss 3.1\n")
    write_json(folder / "progress.json", {"state": "training", "step": 12})
    assert opened.state_of("ar-20-s1") == "failed"
    assert opened.error_of("ar-20-s1") == "killed while training, after step 12; the last line: step 12 loss 3.1"
    write_json(folder / "progress.json", {"state": "failed", "step": 12})
    assert opened.error_of("ar-20-s1") == "step 12 loss 3.1"


def test_a_run_of_checkpoints_goes_on_to_a_larger_budget_and_not_back_to_a_smaller(tmp_path):
    def with_budgets(*amounts: int) -> StudyFolder:
        return begun(tmp_path, {"budgets": {"column": "steps", "amounts": list(amounts), "runs": "checkpoints"}})

    opened = with_budgets(20, 40)
    finish(opened, "ar-s1")
    write_json(opened.run_folder("ar-s1") / "summary.json", {"finished": True, "step": 40})
    assert with_budgets(20, 40).state_of("ar-s1") == "finished"
    (opened.run_folder("ar-s1") / "checkpoints" / "step_00000020").mkdir(parents=True)
    assert with_budgets(20, 80).state_of("ar-s1") == "stopped"
    with pytest.raises(ConfigError, match="ar-s1 is beyond step 30, where it would need a checkpoint now"):
        with_budgets(20, 30, 40)


def test_what_was_measured_may_not_be_measured_otherwise(tmp_path):
    opened = begun(tmp_path)
    point = next(point for point in opened.expanded.points if point.name == "cola-20-s1")
    opened.measurements_of(point).mkdir(parents=True)
    write_json(opened.measurements_of(point) / "likelihood.json", {"texts": 64})
    arms = {**SMALL["arms"], "cola": {**SMALL["arms"]["cola"], "likelihood": {"samples": 2}}}
    for over in ({"measures": {"likelihood_texts": 128}}, {"arms": arms}):
        with pytest.raises(ConfigError, match=r"likelihood\.json of cola-20-s1 was .* remove measurements"):
            begun(tmp_path, over)
    more = begun(tmp_path, {"measures": {"likelihood_texts": 64, "last_word_items": 10}, "seeds": [1, 2, 3]})
    assert more.missing_measures(point) == ["last_word.json"]


def test_a_study_is_gone_on_with_from_another_working_directory(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("model: {family: autoregressive}")
    over = {"arms": {"a": {"config": "mine.yaml"}}, "data": {"source": "recipe.yaml"}, "measures": {"tasks": ["all"]}}
    monkeypatch.chdir(tmp_path)
    study = load_study(write(tmp_path, over), benchmarks=Path("items"))
    assert study.arms["a"].config == str(tmp_path / "mine.yaml")
    assert study.data.source == str(tmp_path / "recipe.yaml")
    assert study.measures.benchmarks == tmp_path / "items"
    named = [load_study(write(tmp_path, {"data": {"path": path}})).data.path for path in ("data", "s3://bucket/data")]
    assert named == [str(tmp_path / "data"), "s3://bucket/data"]
    assert load_study(write(tmp_path, {"data": {"source": "embedded"}})).data.source == "embedded"


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"generation": {"guidance": 3}}, "cola-20-s1: .*guidance"),
        ({"likelihood": {"draws": 3}}, "cola-20-s1: .*draws"),
    ],
)
def test_a_wrong_setting_of_a_measurement_is_seen_before_anything_is_trained(arm, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        jobs_of(begun(tmp_path, {"arms": {"cola": {**SMALL["arms"]["cola"], **arm}}}))


def test_a_recipe_is_prepared_as_one_and_fits_the_runs(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    tree = {"output": "x", "sources": [{"name": "a", "inputs": ["a.txt"]}], "tokenizer": {"vocab_size": 2048}}
    for length in (128, 64):
        recipe.write_text(yaml.safe_dump({**tree, "packing": {"sequence_length": length}}))
        over = {"data": {"source": str(recipe)}}
        if length == 128:
            (words,) = jobs_of(begun(tmp_path, over))["data"].words()
            assert words == ["prep", "run", "--recipe", str(recipe), "--output", str(tmp_path / "out" / "data")]
        else:
            with pytest.raises(ConfigError, match=r"packing\.sequence_length=64, and the runs have .*=128"):
                jobs_of(begun(tmp_path, over))


def test_on_gpus_the_memory_of_the_machine_does_not_hold_the_models(tmp_path):
    arms = {"ar": {"config": "paper-2b-autoregressive"}}
    opened = begun(tmp_path, {"arms": arms, "overrides": {"training.schedule.warmup_steps": 2}, "seeds": [1]})
    on_cpu, on_gpus = (jobs_of(opened, 8, on_gpus=gpus)["ar-20-s1"].memory for gpus in (False, True))
    assert on_cpu > 200e9 > 100e9 > on_gpus


def test_measurements_read_the_data_of_the_study(tmp_path):
    measures = {"likelihood_texts": 8, "last_word_items": 8}
    arm = {"config": "tiny", "generation": {"guidance_interval": [0.2, 0.8], "noise": "hashed"}}
    over = {"arms": {"cola": {**SMALL["arms"]["cola"], **arm}}, "measures": measures, "data": {"source": "embedded"}}
    opened = begun(tmp_path, over)
    likelihood, last_word = jobs_of(opened)["measure-cola-20-s1"].words()
    for words in (likelihood, last_word):
        assert words[words.index("--data") + 1] == str(tmp_path / "out" / "data")
    assert "guidance_interval=[0.2, 0.8]" in last_word


def test_what_is_no_study_is_refused_and_left_alone(tmp_path):
    with pytest.raises(ConfigError, match=r"is no study: it has no index\.json"):
        StudyFolder.open(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="is not empty and no study"):
        begun(tmp_path)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("content", ["{", "", "[]"])
def test_a_lost_index_is_made_anew_from_the_runs(content, tmp_path):
    opened = begun(tmp_path)
    before = (opened.folder / INDEX).read_text()
    with pytest.raises(ConfigError, match="no run there says which study it is of"):
        StudyFolder.rebuild(opened.folder)
    finish(opened, "ar-20-s1")
    (opened.folder / INDEX).write_text(content)
    with pytest.raises(ConfigError, match=r"cannot be read: `cola sweep status .* --rebuild-index`"):
        StudyFolder.open(opened.folder)
    StudyFolder.rebuild(opened.folder)
    assert (opened.folder / INDEX).read_text() == before


# ---- table ----------------------------------------------------------------------------------------------------------


def test_the_table_has_a_row_for_every_point_whatever_is_missing(tmp_path):
    opened = begun(tmp_path)
    finish(opened, "ar-20-s1")
    finish(opened, "ar-40-s1")
    point = next(point for point in opened.expanded.points if point.name == "ar-20-s1")
    folder = opened.measurements_of(point)
    folder.mkdir(parents=True)
    figure = {"value": 4.5, "standard_error": 0.1, "draw_error": None, "kind": "exact"}
    write_json(folder / "likelihood.json", {"texts": 64, "nats_per_token": figure})
    (opened.run_folder("cola-stage1-s1")).mkdir(parents=True)
    (opened.run_folder("cola-stage1-s1") / "log.txt").write_text("step 1\ncola: no space left\n")
    document = collect(opened)
    assert json.loads((opened.folder / "results.json").read_text())["rows"] == document["rows"]
    rows = {row["point"]: row for row in document["rows"]}
    assert len(rows) == 8
    done = rows["ar-20-s1"]
    assert (done["state"], done["error"], done["budget"], done["arm"]) == ("finished", None, 20, "ar")
    assert done["measures"]["nats_per_token"]["value"] == 4.5
    config = opened.expanded.runs["ar-20-s1"].config
    assert done["compute"] == compute_of(config, 20) and done["tokens"] == 20 * 32 * 128
    assert rows["ar-40-s1"]["error"] == "not measured: likelihood.json"
    assert rows["cola-20-s1"]["error"] == "cola-stage1-s1: failed, cola: no space left"
    assert rows["cola-20-s1"]["stage_one_compute"]["model"] > 0 == rows["ar-20-s1"]["stage_one_compute"]["model"]
    assert rows["cola-20-s2"]["error"] == "cola-stage1-s2: not begun"
    assert {each["point"] for each in document["lost"]} == rows.keys() - {"ar-20-s1"}


@pytest.mark.parametrize("content", ['{"elbo": 3}', "{", ""])
def test_a_measurement_that_cannot_be_read_is_named_and_takes_no_other_point_away(content, tmp_path):
    opened = begun(tmp_path)
    finish(opened, "ar-20-s1")
    folder = opened.measurements_of(next(point for point in opened.expanded.points if point.name == "ar-20-s1"))
    folder.mkdir(parents=True)
    (folder / "likelihood.json").write_text(content)
    row = next(row for row in collect(opened)["rows"] if row["point"] == "ar-20-s1")
    assert row["state"] == "damaged" and f"{folder / 'likelihood.json'}: not what this version writes" in row["error"]


def test_a_stage_one_from_elsewhere_is_charged_where_its_cost_is_known_and_named_where_not(tmp_path, tiny):
    arms = {"cola": {"config": "tiny", "overrides": {"training.stage_one": str(tmp_path / "published")}}}
    (document,) = [collect(begun(tmp_path, {"arms": arms}))]
    assert document["rows"][0]["stage_one_compute"]["model"] == 0
    assert document["study"]["notes"] == [
        f"What {tmp_path / 'published'} cost, which cola starts from, is not known and not charged."
    ]


def test_an_arm_that_goes_on_from_elsewhere_is_planned_as_a_whole(tmp_path):
    arms = {"ar": {"config": "tiny-autoregressive", "overrides": {"training.start_from": "/elsewhere"}}}
    study = load_study(write(tmp_path, {"arms": arms, "seeds": [1]}))
    (share,) = shares_of(study, expand(study, tmp_path), None)
    assert (share.role, share.runs, share.steps) == ("run", 2, 60)


def test_a_branch_is_planned_without_its_trunk(tmp_path):
    budgets = {"column": "steps", "amounts": [20, 40], "runs": "branches", "decay_share": 0.25, "warmup_share": 0.1}
    arms = {"ar": {"config": "tiny-autoregressive"}}
    study = load_study(write(tmp_path, {"arms": arms, "budgets": budgets, "seeds": [1]}))
    trunk, branches = shares_of(study, expand(study, tmp_path), None)
    assert (trunk.role, trunk.steps, branches.role, branches.steps) == ("trunk", 30, "run", 5 + 10)
    one_step = trunk.compute["model"] / 30
    assert branches.compute["model"] == pytest.approx(15 * one_step)


def test_scores_of_tasks_are_averaged_with_their_errors(tmp_path):
    measures = {"likelihood_texts": 0, "tasks": ["lambada", "squad"], "benchmarks": str(tmp_path)}
    opened = begun(tmp_path, {"measures": measures})
    finish(opened, "ar-20-s1")
    folder = opened.measurements_of(next(point for point in opened.expanded.points if point.name == "ar-20-s1"))
    (folder / "tasks").mkdir(parents=True)
    for task, verdicts in (("lambada", [True, False, False, True]), ("squad", [False] * 4)):
        items = [{"id": number, "correct": correct} for number, correct in enumerate(verdicts)]
        write_json(folder / "tasks" / f"{task}.json", {"task": task, "model": "m", "settings": {}, "items": items})
    measured = next(row for row in collect(opened)["rows"] if row["point"] == "ar-20-s1")["measures"]
    assert (measured["lambada"]["value"], measured["squad"]["value"]) == (0.5, 0.0)
    assert measured["squad"]["error"] > 0, "four wrong answers are not known for certain"
    assert measured["task_average"]["value"] == 0.25
    errors = [measured[task]["error"] for task in ("lambada", "squad")]
    assert measured["task_average"]["error"] == pytest.approx(math.hypot(*errors) / 2)


def test_a_branch_has_taken_the_time_of_its_trunk_as_well(tmp_path):
    budgets = {"column": "steps", "amounts": [20, 40], "runs": "branches", "decay_share": 0.25, "warmup_share": 0.1}
    opened = begun(tmp_path, {"arms": {"ar": {"config": "tiny-autoregressive"}}, "budgets": budgets, "seeds": [1]})
    for name, steps in (("ar-trunk-s1", (15, 30)), ("ar-20-s1", (20,))):
        finish(opened, name)
        records = [{"kind": "train", "step": step, "loss": 1.0, "seconds": 2.0 * step} for step in steps]
        (opened.run_folder(name) / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
        begin_attempt(opened.run_folder(name), 0, 2)
    row = next(row for row in collect(opened)["rows"] if row["point"] == "ar-20-s1")
    assert (row["seconds"], row["devices"]) == (2.0 * 15 + 2.0 * 20, 2)
    assert row["device_hours"] == pytest.approx(70 * 2 / 3600)
