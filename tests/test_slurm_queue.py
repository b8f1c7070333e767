"""What is submitted is known, found again and not submitted twice, whatever Slurm says; on a real one."""

import json
import os
from pathlib import Path

import pytest

from cola_megatron.config import dump_config
from launchers.slurm.queue import Queue
from launchers.slurm.runs import find_runs, has_finished, state_of
from launchers.slurm.site import seconds_of
from tests.commands import cola
from tests.slurm_cluster import Cluster
from tests.support import TINY

HELD = "partition: main\ngpus_per_node: 0\nexclusive: false\npreflight: false\ndirectives: [--hold]\n"


@pytest.fixture
def words(slurm: Cluster, tiny, tmp_path: Path) -> list:
    """The words after `cola submit` for a run whose job waits."""
    (tmp_path / "config.yaml").write_text(dump_config(tiny(1)))
    (tmp_path / "site.yaml").write_text(HELD)
    return [tmp_path / "config.yaml", "--site", tmp_path / "site.yaml", "--json"]


def stub(tmp_path: Path, **lines: str) -> Path:
    """A folder of commands that are lines of shell."""
    path = tmp_path / "bin"
    path.mkdir()
    for name, line in lines.items():
        (path / name).write_text(f"#!/bin/bash\n{line}\n")
        (path / name).chmod(0o755)
    return path


def with_path(slurm: Cluster, path: Path | None) -> dict[str, str]:
    """The environment that finds the commands in `path` before those of the machine."""
    return slurm.environment if path is None else {**slurm.environment, "PATH": f"{path}:{slurm.environment['PATH']}"}


def ran(slurm: Cluster, *arguments: object, path: Path | None = None) -> str:
    """The output of a command that goes well."""
    done = cola(*arguments, env=with_path(slurm, path))
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(slurm: Cluster, *arguments: object, code: int = 1, path: Path | None = None) -> str:
    """The last line of a command that does not."""
    done = cola(*arguments, env=with_path(slurm, path))
    assert done.returncode == code, done.stderr
    return done.stderr.splitlines()[-1]


def state(slurm: Cluster, run_folder: Path) -> tuple[str, str]:
    (run,) = json.loads(ran(slurm, "status", run_folder, "--json"))
    return run["state"], run["job"]


def test_a_queue_that_does_not_answer_is_not_empty(words: list, slurm: Cluster, tiny, tmp_path: Path) -> None:
    run_folder = tiny(1).run_folder
    array = ["submit", "array", *words[:3], "--name", "sweep", "--run", "a seed=1"]
    ran(slurm, "submit", *words)
    ran(slurm, *array)
    path = stub(tmp_path, squeue="echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    shown = cola("status", run_folder, "--json", env=with_path(slurm, path))
    assert shown.returncode == 1 and "Unable to contact slurm controller" in shown.stderr
    assert json.loads(shown.stdout)[0]["state"] == "unknown"
    again = ["submit", "array", "--again", run_folder.parent / "sweep"]
    for command in (["cancel", run_folder], again, ["submit", *words], array):
        assert "is it up (`scontrol ping`)?" in refused(slurm, *command, path=path)
    assert len(slurm.commands("squeue", "--noheader").splitlines()) == 2


@pytest.mark.slow
def test_while_the_controller_is_away(words: list, slurm: Cluster, tiny) -> None:
    run_folder = tiny(1).run_folder
    job = json.loads(ran(slurm, "submit", *words))["job"]
    with slurm.outage():
        for command in ("status", "cancel"):
            assert "is it up (`scontrol ping`)?" in refused(slurm, command, run_folder)
    assert state(slurm, run_folder) == ("pending", job)


def test_a_job_that_was_accepted_is_known(words: list, slurm: Cluster, tiny, tmp_path: Path) -> None:
    """A site's sbatch greets its users, and scontrol fails just now."""
    path = stub(
        tmp_path,
        sbatch='echo "Welcome, 3 messages"; echo 17 >&2; exec /usr/bin/sbatch "$@"',
        scontrol="echo 'slurm_load_jobs error: Socket timed out' >&2; exit 1",
    )
    answer = json.loads(ran(slurm, "submit", *words, path=path))
    assert slurm.job(answer["job"])["JobState"] == "PENDING"
    assert (Path(answer["folder"]) / "job_id").read_text() == f"{answer['job']}\n"
    assert state(slurm, tiny(1).run_folder) == ("pending", answer["job"])


def test_a_job_that_cannot_be_noted_does_not_wait(slurm: Cluster, tmp_path: Path) -> None:
    from launchers.slurm import commands

    (tmp_path / "job.sbatch").write_text("#!/bin/bash\nsleep 1\n")
    (tmp_path / "note").mkdir()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="note"):
        patch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
        commands.submit(tmp_path / "job.sbatch", tmp_path / "note")
    # Slurm shows a cancelled job for as long as its node cleans up.
    slurm.wait_for(lambda: not slurm.commands("squeue", "--noheader"), "an empty queue")


def test_a_run_is_not_submitted_twice(words: list, slurm: Cluster, tiny) -> None:
    run_folder = tiny(1).run_folder
    job = json.loads(ran(slurm, "submit", *words))["job"]
    line = refused(slurm, "submit", *words)
    assert f"{run_folder}: in the queue already as job {job}" in line and f"`cola cancel {run_folder}`" in line
    assert len(list((run_folder / "submissions").iterdir())) == 1, "nothing was written"
    array = ["submit", "array", *words[:3], "--name", "sweep", "--run", "a seed=1"]
    ran(slurm, *array)
    assert "sweep/a: in the queue already" in refused(slurm, *array)
    ran(slurm, "cancel", run_folder)
    ran(slurm, "submit", *words)


def test_a_pipeline_and_a_preparation_are_not_submitted_twice(slurm: Cluster, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"output: {tmp_path / 'data'}\nsources: [{{name: embedded, inputs: [embedded], max_tokens: 400000}}]\n"
        "tokenizer: {vocab_size: 300}\npacking: {sequence_length: 32}\nheld_out_fraction: 0.1\n"
    )
    prep = ["prep", "submit", "--recipe", tmp_path / "recipe.yaml", "--directive=--hold"]
    ran(slurm, *prep)
    assert f"{tmp_path / 'data'}: in the queue already" in refused(slurm, *prep)
    jobs = slurm.commands("squeue", "--noheader", "--array", "--format=%i").splitlines()
    cancelled = ran(slurm, "cancel", tmp_path / "data")
    assert all(job in cancelled for job in jobs)
    assert slurm.commands("squeue", "--noheader") == ""

    (tmp_path / "site.yaml").write_text(HELD)
    overrides = [setting for setting in TINY if not setting.startswith("training.vae_update")]
    chain = ["submit", "pipeline", "tiny", *overrides, f"runs_folder={tmp_path / 'runs'}", "--name", "first"]
    chain += ["--recipe", tmp_path / "recipe.yaml", "--site", tmp_path / "site.yaml", "--json"]
    parts = json.loads(ran(slurm, *chain))
    assert f"{tmp_path / 'runs' / 'first'}: in the queue already" in refused(slurm, *chain)
    assert f"{tmp_path / 'data'}: in the queue already" in refused(slurm, *prep)
    cancelled = ran(slurm, "cancel", tmp_path / "runs" / "first")
    assert all(part["job"] in cancelled for part in parts.values())
    assert slurm.commands("squeue", "--noheader") == ""


def test_a_script_submitted_by_hand_belongs_to_its_run(words: list, slurm: Cluster, tiny) -> None:
    run_folder = tiny(1).run_folder
    folder = Path(json.loads(ran(slurm, "submit", *words))["folder"])
    ran(slurm, "cancel", run_folder)
    job = slurm.commands("sbatch", "--parsable", str(folder / "job.sbatch"))
    assert state(slurm, run_folder) == ("pending", job)
    assert f"as job {job}" in refused(slurm, "submit", *words)
    assert ran(slurm, "cancel", run_folder) == f"cancelled {job}\n"


def test_files_that_a_power_cut_left_empty_are_passed_over(tmp_path: Path) -> None:
    submission = tmp_path / "first" / "submissions" / "0001"
    submission.mkdir(parents=True)
    for path in (submission / "config.yaml", submission / "job_id", submission / "events.jsonl"):
        path.touch()
    for name in ("progress.json", "summary.json", "config.yaml", "manifest.json"):
        (tmp_path / "first" / name).touch()
    assert find_runs([tmp_path]) == [tmp_path / "first"]
    assert state_of(tmp_path / "first", Queue()).state == "unknown"
    assert not has_finished(tmp_path / "first")


def test_a_time_limit_that_leaves_no_time_is_refused(words: list, slurm: Cluster, tiny) -> None:
    assert "give a longer --time" in refused(slurm, "submit", *words, "--time", "5", "--dry-run", code=2)
    slurm.commands("scontrol", "update", "PartitionName=high", "MaxTime=5")
    assert "give a longer --time" in refused(slurm, "submit", *words, "--partition", "high")
    slurm.commands("scontrol", "update", "PartitionName=high", "MaxTime=7-0")
    assert slurm.commands("squeue", "--noheader") == ""


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("5", 300),
        ("5:30", 330),
        ("1:00:00", 3600),
        ("2-0", 172_800),
        ("1-02:03", 93_780),
        ("1-00:00:01", 86_401),
        ("UNLIMITED", float("inf")),
        ("", float("inf")),
    ],
)
def test_time_limits_as_slurm_reads_them(limit: str, seconds: float) -> None:
    assert seconds_of(limit) == seconds


def test_what_cannot_be_cancelled_is_said_job_by_job(tmp_path: Path) -> None:
    said = (
        "scancel: error: Kill job error on job id 123: Invalid job id specified\n"
        "scancel: error: Kill job error on job id 7_3: Access/permission denied"
    )
    path = stub(tmp_path, squeue="true", sacct="true", scontrol="true", scancel=f"echo '{said}' >&2; exit 1")
    done = cola("cancel", "123", "7_3", "9", env={**os.environ, "PATH": f"{path}:{os.environ['PATH']}"})
    assert done.returncode == 1
    assert done.stderr == (
        "cola: 123: Slurm knows no such job, or has forgotten it since it ended; `cola status` shows what is there; "
        "7_3: is another user's job, which Slurm does not let you end; cancelled 9\n"
    )
