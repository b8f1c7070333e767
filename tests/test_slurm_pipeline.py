"""`cola submit pipeline`: from text to a report as a chain of jobs, on a real Slurm."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cola_megatron.config import ConfigError
from data_prep.recipe import Recipe
from launchers.prep_recipes import from_file
from launchers.slurm.pipeline import Pipeline, plan_pipeline
from launchers.slurm.render import Shape
from launchers.slurm.site import load_site
from tests.slurm_cluster import Cluster
from tests.support import TINY

SMALL = [setting for setting in TINY if not setting.startswith(("training.vae_update", "training.steps"))]
SITE = "partition: main\ngpus_per_node: 0\nexclusive: false\npause_seconds: 0.5\n"
# An item of LAMBADA as `cola eval run` reads it.
ITEMS = [{"id": number, "prompt": "the prior writes latent blocks of", "ground_truth": "noise"} for number in range(2)]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of the embedded corpus, cut short."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"output: {tmp_path / 'data'}\n"
        "sources: [{name: embedded, inputs: [embedded], max_tokens: 400000}]\n"
        "tokenizer: {vocab_size: 300}\npacking: {sequence_length: 32}\nheld_out_fraction: 0.1\n"
    )
    return path


def planned(tmp_path: Path, recipe: Recipe | None, *overrides: str, **more) -> Pipeline:
    site = load_site("plain", ["gpus_per_node=0"])
    given = [*SMALL, f"runs_folder={tmp_path / 'runs'}", *overrides]
    return plan_pipeline("tiny", given, "first", ([], []), recipe, site, Shape(2, 1), **more)


def test_scripts_are_good_shell(tmp_path: Path, recipe: Path) -> None:
    pipeline = planned(tmp_path, from_file(recipe, [], None), benchmarks=tmp_path)
    scripts = pipeline.scripts()
    assert list(scripts) == ["export", "evaluate", "report"]
    for script in (*scripts.values(), pipeline.dry_run()):
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    first, second = pipeline.stages
    assert second.training.stage_one == first.run_folder == tmp_path / "runs" / "first" / "stage1"
    assert first.data.path == second.data.path == str(tmp_path / "data")
    assert not (tmp_path / "runs").exists()


def test_what_cannot_work_is_refused_before_anything_is_submitted(tmp_path: Path, recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"packs sequences of 64 tokens, data\.sequence_length is 32"):
        planned(tmp_path, from_file(recipe, ["packing.sequence_length=64"], None))
    with pytest.raises(ConfigError, match=r"give --recipe, or data\.path"):
        planned(tmp_path, None)
    with pytest.raises(ConfigError, match="no such folder"):
        planned(tmp_path, from_file(recipe, [], None), benchmarks=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="recipes debian-docs, embedded"):
        from_file(Path("nothing"), [], None)


@pytest.mark.slow
def test_the_whole_chain_from_one_command(slurm: Cluster, tmp_path: Path, recipe: Path) -> None:
    benchmarks = tmp_path / "benchmarks"
    benchmarks.mkdir()
    (benchmarks / "lambada.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (tmp_path / "site.yaml").write_text(SITE)
    command = [
        *("submit", "pipeline", "tiny", *SMALL, f"runs_folder={tmp_path / 'runs'}", "training.steps=2"),
        *("--name", "first", "--recipe", str(recipe), "--benchmarks", str(benchmarks), "--tasks", "lambada"),
        *("--site", str(tmp_path / "site.yaml"), "--nodes", "2", "--json"),
    ]

    def submit() -> dict:
        done = subprocess.run(
            [sys.executable, "-m", "launchers.cli", *command], env=slurm.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    parts = submit()
    assert list(parts) == [
        *("prep-tokenizer", "prep-tokenize", "prep-merge", "stage1", "stage2", "export", "evaluate", "report")
    ]
    for name, part in parts.items():
        state = slurm.run_to_the_end(part["job"])
        logs = [path.read_text() for path in Path(part["log"]).parent.glob(Path(part["log"]).name)]
        assert state == "COMPLETED", f"{name}: {logs}"
    folder = tmp_path / "runs" / "first"
    assert (folder / "report.html").is_file() and (folder / "export" / "tokenizer.json").is_file()
    assert (folder / "evaluation" / "lambada.json").is_file()
    assert "accuracy, lambada" in (folder / "report.html").read_text()
    again = submit()
    assert [name for name, part in again.items() if part["job"] is None] == ["prep", "stage1", "stage2"]
    slurm.commands("scancel", *(part["job"] for part in again.values() if part["job"]))
