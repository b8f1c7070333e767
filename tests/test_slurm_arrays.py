"""`cola submit array`, `cola status` and `cola cancel` on a real Slurm."""

import json
from pathlib import Path

from cola_megatron.config import dump_config
from tests import commands
from tests.slurm_cluster import Cluster


def cola(slurm: Cluster, *arguments: object) -> str:
    done = commands.cola(*arguments, env=slurm.environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_run_of_four_fails_and_is_rerun_alone(slurm: Cluster, tiny, corpus: Path, tmp_path: Path) -> None:
    config, late = tiny(1, "training.steps=2"), tmp_path / "late"
    (tmp_path / "config.yaml").write_text(dump_config(config))
    (tmp_path / "site.yaml").write_text("partition: main\ngpus_per_node: 0\nexclusive: false\npreflight: false\n")
    (tmp_path / "runs.txt").write_text(f"# the third has no data yet\nc data.path={late}\n\nd seed=4\n")
    answer = json.loads(
        cola(
            slurm,
            *("submit", "array", tmp_path / "config.yaml", "--name", "sweep", "--site", tmp_path / "site.yaml"),
            *("--run", "a seed=1", "--run", "b seed=2", "--runs", tmp_path / "runs.txt", "--concurrency", 2, "--json"),
        )
    )
    folder = config.runs_folder / "sweep"
    assert [Path(element["run_folder"]) for element in answer["elements"]] == [folder / name for name in "abcd"]

    # All of it waits or trains, and never more than two at once.
    together = set()

    def ended() -> bool:
        states = {
            Path(run["run_folder"]).name: run["state"] for run in json.loads(cola(slurm, "status", folder, "--json"))
        }
        together.add(sum(state == "running" for state in states.values()))
        return states == {"a": "finished", "b": "finished", "c": "failed", "d": "finished"}

    slurm.wait_for(ended, "end of the array", 400, every=4.0)  # each look is a process beside the jobs
    assert max(together) <= 2
    shown = cola(slurm, "status", folder)
    (line,) = [line for line in shown.splitlines() if str(folder / "c") in line]
    assert "failed" in line and "exit code 1" in line
    assert f"see {folder / 'submissions' / '0001' / 'slurm-'}{answer['elements'][2]['job']}.log" in line

    late.symlink_to(corpus)
    again = json.loads(cola(slurm, "submit", "array", "--again", folder, "--json"))
    assert [Path(element["run_folder"]).name for element in again["elements"]] == ["c"]
    slurm.run_to_the_end(f"{again['job']}_0")
    assert all(run["state"] == "finished" for run in json.loads(cola(slurm, "status", folder, "--json")))
    assert "2/2" in cola(slurm, "status", folder / "c")
    refused = commands.cola("submit", "array", "--again", folder, env=slurm.environment)
    assert refused.returncode == 2 and "every run has finished" in refused.stderr


def test_what_waits_is_shown_and_cancelled(slurm: Cluster, tiny, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(tiny(1)))
    (tmp_path / "site.yaml").write_text("partition: main\ngpus_per_node: 0\nexclusive: false\npreflight: false\n")
    blocker = slurm.commands(
        "sbatch", "--parsable", "--exclusive", "--nodes=3", "--output=/dev/null", "--wrap=sleep 60"
    )
    slurm.wait_for(lambda: slurm.job(blocker)["JobState"] == "RUNNING", "the job in the way")
    words = ["submit", tmp_path / "config.yaml", "--site", tmp_path / "site.yaml", "--json"]
    job = json.loads(cola(slurm, *words))["job"]
    runs = tiny(1).runs_folder
    (run,) = json.loads(cola(slurm, "status", runs, "--json"))
    assert (run["state"], run["job"], run["step"]) == ("pending", job, None)
    assert cola(slurm, "cancel", runs) == f"cancelled {job}\n"
    assert cola(slurm, "cancel", runs) == "nothing of it is in the queue\n"
    assert slurm.job(job)["JobState"] == "CANCELLED"
    (run,) = json.loads(cola(slurm, "status", runs, "--json"))
    assert run["state"] == "cancelled" and run["note"] == f"job {job} never began to train"
    slurm.commands("scancel", blocker)


def test_status_without_slurm(tiny, tmp_path: Path) -> None:
    from cola_megatron.training.loop import train

    config = tiny(1, "training.steps=2")
    train(config, progress=False)
    done = commands.cola("status", config.runs_folder, env={"PATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert "finished" in done.stdout and str(config.run_folder) in done.stdout
