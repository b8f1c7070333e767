"""`cola sweep submit`: a study as arrays of a real Slurm, its failures, its queue and what goes on."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml

from cola_megatron.studies.folder import StudyFolder
from cola_megatron.studies.study_file import load_study
from launchers.slurm.commands import SlurmError
from launchers.slurm.render import Shape
from launchers.slurm.site import load_site
from launchers.sweep_slurm import StudyOnSlurm
from launchers.sweep_status import StudyStates, status_rows
from tests import commands
from tests.slurm_cluster import Cluster
from tests.support import TINY

SITE = "partition: main\ngpus_per_node: 0\nexclusive: false\npreflight: false\npause_seconds: 0.5\n"
KEYS = {key: yaml.safe_load(value) for key, value in (setting.split("=", 1) for setting in TINY)}
OF_COLA = {key: value for key, value in KEYS.items() if key.startswith(("model.vae.", "model.dit."))}
OF_BOTH = {
    key: value
    for key, value in KEYS.items()
    if key not in OF_COLA and not key.startswith(("training.steps", "training.vae_update", "training.schedule"))
}
SMALL = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4}


@pytest.fixture
def study(corpus: Path, tmp_path: Path) -> Path:
    """Two arms, one of them of two stages; each a run of two steps, or branches of two budgets."""
    tree = {
        "name": "small",
        "arms": {
            "cola": {"config": "tiny", "overrides": OF_COLA, "stage_one": {"training.steps": 2}},
            "autoregressive": {"config": "tiny-autoregressive", "overrides": {"model.transformer": SMALL}},
        },
        "overrides": {**OF_BOTH, "training.schedule.warmup_steps": 1},
        "budgets": {"column": "steps", "amounts": [2], "with_stage_one": False},
        "data": {"path": str(corpus)},
        "measures": {"likelihood_texts": 2},
        "scales": {
            "branches": {"budgets": {"amounts": [2, 4], "runs": "branches"}},
            "embedded": {"data": {"path": None, "source": "embedded"}},
        },
    }
    (tmp_path / "site.yaml").write_text(SITE)
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def submission(study: Path, output: Path, scale: str | None = None) -> StudyOnSlurm:
    site = load_site(str(study.with_name("site.yaml")), [])
    return StudyOnSlurm(StudyFolder(output, load_study(study, scale)), site, Shape(1, 1), None)


def words(study: Path, output: Path, *more: object) -> list[object]:
    return ["sweep", "submit", study, "--output", output, "--site", study.with_name("site.yaml"), *more]


def cola(slurm: Cluster, *arguments: object) -> str:
    done = commands.cola(*arguments, env=slurm.environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def states(slurm: Cluster, output: Path) -> dict[tuple[str, str], dict]:
    rows = json.loads(cola(slurm, "sweep", "status", output, "--json"))
    return {(row["role"], row["name"]): row for row in rows}


def in_the_way(slurm: Cluster) -> str:
    """A job that holds all nodes, so that what is submitted waits."""
    wait = ("--exclusive", "--nodes=3", "--output=/dev/null", "--wrap=sleep 900")
    blocker = slurm.commands("sbatch", "--parsable", *wait)
    slurm.wait_for(lambda: slurm.job(blocker)["JobState"] == "RUNNING", "the job in the way")
    return blocker


def wait_for_the_chain(slurm: Cluster) -> None:
    slurm.wait_for(lambda: not slurm.commands("squeue", "--noheader"), "end of the chain", 900, every=1.0)


def test_what_is_submitted_waits_in_order_is_refused_twice_and_cancelled(
    slurm: Cluster, study: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    dry = cola(slurm, *words(study, output, "--scale", "branches", "--dry-run"))
    assert dry.count("#!/bin/bash") == 8 and not output.exists()

    blocker = in_the_way(slurm)
    parts = json.loads(cola(slurm, *words(study, output, "--scale", "branches", "--json")))
    assert {name: part["elements"] for name, part in parts.items()} == {
        "stage_one": 1,
        "stage_one-trunk": 1,
        "stage_one-trunk-run": 2,
        "trunk": 1,
        "trunk-run": 2,
        "measure-stage_one-trunk-run": 2,
        "measure-trunk-run": 2,
        "report": 1,
    }
    jobs = {name: part["job"] for name, part in parts.items()}
    name_of = {job: name for name, job in jobs.items()}
    lines = slurm.commands("squeue", "--noheader", "--format=%A|%E").splitlines()
    after = {
        name_of[job]: {name_of[each] for each in re.findall(r"after\w+:(\d+)", waits)}
        for job, waits in (line.split("|") for line in lines)
        if job in name_of
    }
    assert after == {
        "stage_one": set(),
        "stage_one-trunk": {"stage_one"},
        "stage_one-trunk-run": {"stage_one-trunk"},
        "trunk": set(),
        "trunk-run": {"trunk"},
        "measure-stage_one-trunk-run": {"stage_one-trunk-run"},
        "measure-trunk-run": {"trunk-run"},
        "report": set(jobs) - {"report"},
    }
    assert {row["state"] for row in states(slurm, output).values()} == {"pending"}

    refused = commands.cola(*words(study, output, "--scale", "branches"), env=slurm.environment)
    assert refused.returncode == 1 and "in the queue already as job" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert cola(slurm, "cancel", output).startswith("cancelled ")
    assert slurm.commands("squeue", "--noheader", "--format=%A") == blocker
    assert {row["state"] for (role, _), row in states(slurm, output).items() if role != "measured"} == {"cancelled"}
    slurm.commands("scancel", blocker)


@pytest.mark.slow
def test_a_failed_stage_holds_up_its_own_alone_and_is_made_good(
    slurm: Cluster, study: Path, corpus: Path, tmp_path: Path
) -> None:
    output, first, second = tmp_path / "out", ("stage_one", "cola-stage1-s66"), ("run", "cola-2-s66")
    blocker = in_the_way(slurm)
    cola(slurm, *words(study, output))
    # By the time that the job begins, the data of this run are gone.
    (config,) = output.glob(f"runs/{first[1]}/submissions/*/config.yaml")
    config.write_text(config.read_text().replace(str(corpus), str(tmp_path / "lost")))
    slurm.commands("scancel", blocker)
    wait_for_the_chain(slurm)

    found = states(slurm, output)
    assert found["run", "autoregressive-2-s66"]["state"] == "finished"
    assert found["measured", "autoregressive-2-s66"]["state"] == "finished"
    assert found[first]["state"] == found[second]["state"] == "failed"
    assert "manifest.json does not exist" in found[first]["note"] and "slurm-" in found[first]["note"]
    assert "holds no complete checkpoint" in found[second]["note"]
    for _, name in (first, second):  # the same again would fail again
        (events,) = output.glob(f"runs/{name}/submissions/*/events.jsonl")
        assert events.read_text().count('"try"') == 1
    assert "holds no complete checkpoint" in found["measured", "cola-2-s66"]["note"]
    (lost,) = json.loads((output / "results.json").read_text())["lost"]
    assert lost["point"] == "cola-2-s66" and "manifest.json does not exist" in lost["why"]

    parts = json.loads(cola(slurm, *words(study, output, "--json")))
    assert {name: part["elements"] for name, part in parts.items()} == {
        "stage_one": 1,
        "stage_one-run": 1,
        "measure-stage_one-run": 1,
        "report": 1,
    }
    wait_for_the_chain(slurm)
    document = json.loads((output / "results.json").read_text())
    assert document["lost"] == [] and {row["state"] for row in document["rows"]} == {"finished"}
    assert (output / "report.html").is_file()
    assert {row["state"] for row in states(slurm, output).values()} == {"finished"}


@pytest.mark.slow
def test_branches_start_from_their_trunk(slurm: Cluster, study: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    cola(slurm, *words(study, output, "--scale", "branches"))
    wait_for_the_chain(slurm)
    assert {row["state"] for row in states(slurm, output).values()} == {"finished"}
    assert json.loads((output / "results.json").read_text())["lost"] == []


def test_data_that_a_study_prepares_come_first_and_must_end_well(study: Path, tmp_path: Path) -> None:
    text = submission(study, tmp_path / "out", "embedded").dry_run()
    scripts = text.split("#!/bin/bash")[1:]
    assert f"prep run embedded --output {tmp_path}/out/data --sequence-length 32 --vocab-size 300" in scripts[0]
    assert [script.count("sweep measure") for script in scripts] == [0, 0, 0, 0, 1, 1, 0]
    assert not (tmp_path / "out").exists()

    opened = StudyFolder.begin(tmp_path / "out", load_study(study, "embedded"))
    assert status_rows(opened)[0]["state"] == "not begun"
    (tmp_path / "out" / "submissions" / "0001").mkdir(parents=True)
    (tmp_path / "out" / "submissions" / "0001" / "data-7.log").write_text("cola: the disk is full\n")
    assert status_rows(opened)[0]["note"].startswith("cola: the disk is full; see ")


def fake(folder: Path, **commands_of_slurm: str) -> None:
    folder.mkdir()
    for name, script in commands_of_slurm.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)


def test_more_points_than_an_array_may_have_are_refused(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(tmp_path / "bin", squeue="", scontrol="echo 'MaxArraySize = 1'")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(SlurmError, match=r"2 runs: this Slurm allows arrays of 1 \(MaxArraySize\); take seeds"):
        submission(study, tmp_path / "out", "branches").submit()
    assert not (tmp_path / "out" / "submissions").exists()


def test_what_was_accepted_is_cancelled_where_a_later_part_is_refused(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    sbatch = f'echo "$@" >> {log}; [[ $* != *measure* ]] || {{ echo "invalid partition" >&2; exit 1; }}; echo 7'
    fake(tmp_path / "bin", squeue="", scontrol="", sbatch=sbatch, scancel=f'echo cancelled "$@" >> {log}')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(SlurmError, match="invalid partition"):
        submission(study, tmp_path / "out").submit()
    assert log.read_text().splitlines()[-1] == "cancelled 7 7 7"
    assert "--dependency=afterany:7" in log.read_text()


def test_states_are_those_of_who_trained_last(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = StudyFolder.begin(tmp_path / "out", load_study(study))
    monkeypatch.setenv("PATH", str(tmp_path))
    run = opened.run_folder("cola-2-s66")
    place = run / "submissions" / "0001"
    place.mkdir(parents=True)
    (place / "job_id").write_text("7\n")
    said = "cola: the disk is full\ncola: rank 0 ended with exit code 1\nsrun: error: n1: task 0: Exited\n"
    (place / "slurm-7.log").write_text(f"step 1\n{said}cola: the job ends with code 1: the lines above say why\n")
    (place / "events.jsonl").write_text('{"event": "stop", "code": 1, "reason": "why", "job": "7"}\n')
    assert StudyStates(opened).of_run("cola-2-s66") == (
        "failed",
        f"cola: the disk is full; see {place / 'slurm-7.log'}",
    )
    (run / "log.txt").write_text("cola: no such data\n")  # `cola sweep resume`, later
    os.utime(place / "job_id", (1, 1))
    assert StudyStates(opened).of_run("cola-2-s66") == ("failed", "cola: no such data")
    assert {row["state"] for row in status_rows(opened)} == {"failed", "not begun"}
