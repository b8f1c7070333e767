"""docs/python.md and docs/training.ipynb do what they say: their code runs from top to bottom, in an empty folder."""

import contextlib
import json
import os
import re
import shutil
import traceback
from pathlib import Path

import pytest

from tests.ranks import FORKED

ROOT = Path(__file__).resolve().parents[1]
PAGE, NOTEBOOK = ROOT / "docs" / "python.md", ROOT / "docs" / "training.ipynb"


def run(blocks: list[str], folder: Path, then: str) -> str:
    """Runs the blocks and `then` in one namespace, in a process of its own in the folder; returns what they print."""
    process = FORKED.Process(target=_execute, args=([*blocks, then], folder))
    process.start()
    process.join(240)
    if process.exitcode is None:
        process.kill()
        process.join()
    shown = (folder / "shown").read_text(encoding="utf-8")
    assert process.exitcode == 0, shown[-3000:]
    return shown


def _execute(blocks: list[str], folder: Path) -> None:
    os.chdir(folder)
    with (folder / "shown").open("w", encoding="utf-8") as file:
        namespace = {"__name__": "__main__"}
        with contextlib.redirect_stdout(file):
            try:
                for number, block in enumerate(blocks, 1):
                    exec(compile(block, f"block {number}", "exec"), namespace)
            except BaseException:
                traceback.print_exc(file=file)
                raise SystemExit(1) from None


@pytest.fixture(scope="module")
def of_the_page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which the page was run, and what it printed."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("page")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 8
    return folder, run(blocks, folder, "print(len(texts), [run.label for run in runs], page.name)")


def cells(kind: str) -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def test_the_page_runs_from_top_to_bottom(of_the_page):
    folder, shown = of_the_page
    assert shown.splitlines()[-1] == "2 ['slow', 'fast'] comparison.html"
    assert "training.optimizer.learning_rate ('0.0001', '0.001')" in shown
    assert (folder / "comparison" / "comparison.html").is_file()


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(of_the_page, tmp_path):
    shutil.copytree(of_the_page[0] / "data", tmp_path / "data")  # by the same recipe
    blocks = ["".join(cell["source"]) for cell in cells("code")]
    shown = run(
        blocks, tmp_path, "print([prior.step for prior in priors], sorted(metrics)[0], [r.label for r in runs])"
    )
    assert shown.splitlines()[-1] == "[6, 6] constant_predictor_loss ['joint', 'frozen']"


def test_the_notebook_is_stored_without_what_it_printed():
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells("code"))
    identifiers = [cell["id"] for kind in ("code", "markdown") for cell in cells(kind)]
    assert len(set(identifiers)) == len(identifiers)
    assert NOTEBOOK.stat().st_size < 20_000
