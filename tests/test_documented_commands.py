"""Every command of every page, help and message is one that the real command line takes, with files that there are.

Nothing is run: presets, keys, options, studies, recipes, targets of make and names of tests are looked up.
"""

import ast
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cola_megatron.studies.study_file import load_study
from launchers.cli import app
from launchers.prep_recipes import from_file
from launchers.slurm.site import example
from tests.documented_commands import FENCE, ROOT, Shown, check, command_line, groups, leaves, shown_on

PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
OWN = frozenset(["web.yaml", "study.yaml", "our.yaml"])
"""Files of a reader's own, which pages speak of."""


def checked(shown: Shown) -> None:
    try:
        check(shown, OWN)
    except Exception as error:
        said = getattr(error, "message", None) or str(error)
        raise AssertionError(f"{shown.place}: {shown.text}\n{type(error).__name__}: {said}") from error


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_taken(page):
    for shown in shown_on(page):
        checked(shown)


def test_most_commands_are_found():
    found = [shown for page in PAGES for shown in shown_on(page)]
    assert sum(shown.is_whole for shown in found) > 80 and len({shown.text for shown in found}) > 150
    assert {shown.words[0] for shown in found} >= {"cola", "make", "python", "pytest", "torchrun"}


@pytest.mark.parametrize(
    "text",
    [
        "cola nosuch",
        "cola train papier",
        "cola train tiny model.width=3",
        "cola plan tiny",
        "cola plan tiny --gpus many",
        "cola launch --nproc 8 train tiny model.width=3",
        "cola launch --nproc 3 train paper-2b data.path=data/web",
        "cola eval runs/first --no-such-option",
        "cola sweep run rq9 --output studies/rq9",
        "cola prep run --recipe nosuch",
        "cola config tiny --against papier",
        "make nosuch",
        "make setup EXTRAS=nosuch",
        "make test NOSUCH=1",
        "pytest tests/test_nosuch.py",
        "pytest tests/test_docs.py -k nosuch",
        "python -m tools.bench_step papier --no-such-option",
        "torchrun --nproc-per-node 8 -m cola_megatron train tiny model.width=3",
    ],
)
def test_a_wrong_command_is_noticed(text):
    with pytest.raises(AssertionError):
        checked(Shown("here", text, is_whole=True))


# ---- helps and messages ---------------------------------------------------------------------------------------------


def test_every_command_and_group_has_an_example_and_examples_are_taken():
    for path, command in [*leaves(command_line()), *groups(command_line())]:
        name, text = f"cola {' '.join(path)} --help", f"{command.help or ''}\n{command.epilog or ''}"
        _, shows, examples = text.partition("Example")
        assert shows, f"{name} has no example"
        for quoted, bare in re.findall(r"`((?:cola|torchrun) [^`]+)`|: (cola .+)", examples):
            checked(Shown(name, re.sub(r"\s+", " ", quoted or bare), is_whole=True))


def test_commands_that_messages_name_are_there():
    found = 0
    for folder in ("cola_megatron", "data_prep", "launchers", "slurm", "tools"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    for text in re.findall(r"`((?:cola|make) [^`]+)`", node.value):
                        checked(Shown(file.name, re.sub(r"\s+", " ", text), is_whole=False))
                        found += 1
    assert found > 100


# ---- files that pages show ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_and_studies_of_a_page_can_be_read(page, tmp_path):
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if language != "yaml":
            continue
        file = Path(tmp_path / "shown.yaml")
        file.write_text(block, encoding="utf-8")
        kind = yaml.safe_load(block)
        if "arms" in kind:
            for scale in [None, *kind.get("scales", {})]:
                load_study(file, scale)
        elif "sources" in kind:
            assert from_file(file, [], None).sources
        else:
            raise AssertionError(f"{page.name} shows a file of an unknown kind: {', '.join(kind)}")


# ---- what Slurm would be given --------------------------------------------------------------------------------------


def submissions() -> list[Shown]:
    """Whole commands that submit training, of fenced blocks and of numbered steps."""
    found = [shown for page in PAGES for shown in shown_on(page)]
    training = [shown for shown in found if shown.words[:2] == ["cola", "submit"] and "--again" not in shown.words]
    studies = [shown for shown in found if shown.words[:3] == ["cola", "sweep", "submit"]]
    training += [shown for shown in studies if "--output" in shown.words]  # the others stand in a sentence
    return [shown for shown in training if "--nodes" in shown.words]


@pytest.mark.parametrize("shown", submissions(), ids=lambda shown: " ".join(shown.words[:3]))
def test_a_submission_of_a_page_fits_its_processes(shown, tmp_path, monkeypatch):
    """As far as its script: batch, micro-batch, layout and sequence length agree on eight GPUs a node."""
    monkeypatch.chdir(tmp_path)
    place = str(tmp_path / "data")
    for folder in ("benchmarks", "crawl"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    (tmp_path / "data" / "crawl" / "pages.jsonl").write_text('{"text": "a page"}\n')
    blocks = [
        block for language, block in FENCE.findall((ROOT / "docs" / "slurm.md").read_text()) if language == "yaml"
    ]
    (tmp_path / "web.yaml").write_text(next(block for block in blocks if "sources" in block).replace("/data", place))
    (tmp_path / "our.yaml").write_text(example("plain"))
    monkeypatch.setenv("COLA_SITE", str(tmp_path / "our.yaml"))
    words = [re.sub("^/data", place, word) for word in shown.words]
    found = CliRunner().invoke(app, [*words[1:], "--dry-run"])
    assert found.exit_code == 0, f"{shown.place}: {shown.text}\n{found.output}\n{found.exception}"
    assert "#SBATCH --nodes=" in found.output
