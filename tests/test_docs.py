"""The documentation says what is there: settings, links, paths, functions, layers of imports."""

import ast
import graphlib
import re
from pathlib import Path
from typing import Annotated
from xml.etree import ElementTree

import pytest

from cola_megatron.checkpoint.compatible import FREE_KEYS
from cola_megatron.config import Section
from cola_megatron.config.facts import OURS, Origin
from cola_megatron.config.types import Int
from tools import config_reference

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cola_megatron"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("README.md")])

# Top-level folders whose paths a page may name; `runs/`, `data/`, `exports/` are examples of a reader's own.
SOURCE_FOLDERS = ("cola_megatron", "data_prep", "docs", "launchers", "slurm", "tests", "tools")
SUFFIXES = (".py", ".md", ".svg", ".png", ".sbatch.j2", ".html.j2")

# From the top: a layer may import from itself and from those below it.
LAYERS = (
    ("launchers",),
    ("tools", "data_prep", "slurm"),
    ("reporting", "scaling", "studies", "compare_models.py"),
    ("interface.py", "evaluation", "training", "preflight"),
    ("held_out", "conversion", "planning"),
    ("families",),
    ("inference", "interop"),
    ("checkpoint", "costs"),
    ("models", "objectives", "records", "data"),
    ("layers",),
    ("parallel",),
    ("config", "errors.py", "cuda_environment.py"),
)


def ids(path: Path) -> str:
    return path.name


# ---- configuration.md -----------------------------------------------------------------------------------------------


def test_the_configuration_page_is_current():
    assert config_reference.main(["--check"]) == 0


def test_a_page_that_is_not_current_is_noticed(tmp_path, monkeypatch, capsys):
    page = tmp_path / "configuration.md"
    monkeypatch.setattr(config_reference, "PAGE", page)
    assert config_reference.main(["--check"]) == 1
    assert config_reference.main([]) == 0
    assert config_reference.main(["--check"]) == 0
    page.write_text(page.read_text().replace("`66`", "`67`"))
    assert config_reference.main(["--check"]) == 1
    assert "run `python -m tools.config_reference`" in capsys.readouterr().err


def test_every_key_has_a_meaning_and_an_origin():
    # `rows` raises for a key without.
    rows = {row.key: row for part in config_reference.parts() for row in config_reference.rows(part)}
    assert len(rows) > 100
    published = [rows[key].origin for key in ("seed", "model.dit.block_size", "training.optimizer.max_gradient_norm")]
    assert set(published) == {Origin.PUBLISHED}
    for row in rows.values():
        assert not ("Not published" in row.meaning and row.origin is Origin.PUBLISHED), row.key


@pytest.mark.parametrize("field", ["without_meaning", "without_origin"])
def test_a_key_without_meaning_or_origin_is_not_written(field):
    class WithoutMeaning(Section):
        without_meaning: Annotated[Int, OURS] = 1

    class WithoutOrigin(Section):
        without_origin: Int = 1
        """What it is."""

    kind = WithoutMeaning if field == "without_meaning" else WithoutOrigin
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.{field} needs a docstring under it and an origin"):
        config_reference.rows(config_reference.Part("", kind, is_free=False))


def test_the_page_marks_the_keys_that_may_change_at_a_resume():
    rows = [row for part in config_reference.parts() for row in config_reference.rows(part)]
    assert {row.key for row in rows if row.is_free} == {
        row.key for row in rows if any(row.key == key or row.key.startswith(f"{key}.") for key in FREE_KEYS)
    }
    assert "parallel.zero_stage" in {row.key for row in rows if row.is_free}


# ---- links, paths, functions ----------------------------------------------------------------------------------------


def targets(text: str) -> list[str]:
    """Relative targets of links and pictures."""
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in found if "://" not in target and not target.startswith("mailto:")]


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_relative_links_lead_somewhere(page):
    for target in targets(page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked), f"{page.name} links to {target}"


def mentions(text: str) -> set[str]:
    """File paths that a page names in code: below a source folder, or with the suffix of a source file."""
    code = re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL)
    words = {word.rstrip(".,:;/") for part in code for word in re.findall(r"[\w.*/-]+", part)}
    return {
        word
        for word in words
        if "/" in word
        and not word.startswith(("/", ".", "-"))
        and (word.split("/")[0] in SOURCE_FOLDERS or word.endswith(SUFFIXES))
    }


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_named_files_exist(page):
    for path in mentions(page.read_text(encoding="utf-8")):
        assert any(list(folder.glob(path)) for folder in (ROOT, PACKAGE, page.parent)), f"{page.name} names {path}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_named_modules_exist(page):
    for module in re.findall(r"-m ((?:launchers|tools|data_prep|cola_megatron)[\w.]*)", page.read_text()):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), f"{page.name} runs {module}"


def definitions(path: Path) -> set[str]:
    """Names of functions and classes of a file, methods as Class.method."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def test_every_equation_lives_where_the_page_says():
    rows = re.findall(r"^\|.*\| `([\w/]+\.py)` \| (.+) \|$", ARCHITECTURE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 25
    for file, functions in rows:
        for function in re.findall(r"`([\w.]+)`", functions):
            assert function in definitions(PACKAGE / file), f"{file} has no {function}"


def test_every_objective_has_its_row():
    text = ARCHITECTURE.read_text(encoding="utf-8")
    for path in sorted((PACKAGE / "objectives").glob("*.py")):
        for name in definitions(path) - {"generator"}:
            assert f"`{name}`" in text, f"{path.name}: {name} is not in the table of equations"


# ---- layers of imports ----


def layer_of(path: Path) -> int | None:
    """Layer of a source file, from the top; None for the package's own __init__ and the start of the command."""
    top, *rest = path.relative_to(ROOT).parts
    name = rest[0] if top == "cola_megatron" else top
    found = [index for index, layer in enumerate(LAYERS) if name in layer]
    if not found and name not in ("__init__.py", "__main__.py", "command.py"):
        raise AssertionError(f"{path.relative_to(ROOT)} stands in no layer")
    return found[0] if found else None


def imported(path: Path) -> set[Path]:
    """Files of the project that a file imports, also inside functions; names of a package count as the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for module in modules:
            place = ROOT / module.replace(".", "/")
            if module == "cola_megatron.ColaDLM":
                found.add(PACKAGE / "interface.py")
            elif place.with_suffix(".py").is_file():
                found.add(place.with_suffix(".py"))
            elif (place / "__init__.py").is_file() and module != "cola_megatron":
                found.add(place / "__init__.py")
    return found


def sources() -> list[Path]:
    """All source files but the tests."""
    folders = ("cola_megatron", "data_prep", "launchers", "tools")
    return [path for name in folders for path in (ROOT / name).rglob("*.py")]


def test_imports_point_downwards():
    assert len(sources()) > 60
    for path in sources():
        own = layer_of(path)
        for other in imported(path):
            theirs = layer_of(other)
            if own is not None and theirs is not None:
                assert theirs >= own, f"{path.relative_to(ROOT)} imports {other.relative_to(ROOT)}, which is above it"


def test_no_file_imports_itself_through_others():
    modules = [path for path in sources() if path.name != "__init__.py"]
    graph = graphlib.TopologicalSorter({path: imported(path) - {path} for path in modules})
    graph.prepare()  # raises CycleError with the names of a circle


def test_the_picture_shows_the_layers():
    picture = ElementTree.parse(ROOT / "docs" / "architecture.svg")
    spans = [span.text for span in picture.iter("{http://www.w3.org/2000/svg}tspan") if span.get("class") == "name"]
    there = [name for layer in LAYERS for name in layer if any(layer_exists(name))]
    assert spans == there


def layer_exists(name: str) -> list[bool]:
    """Whether a name of `LAYERS` is a file, or a package with code, here."""
    places = (ROOT / name, PACKAGE / name)
    return [place.is_file() or any(place.glob("*.py")) for place in places]


def test_pages_name_no_place_of_this_machine():
    for page in PAGES:
        for word in re.findall(r"(?<![\w.:/])/(?:home|root|work|tmp|mnt|usr)/[\w/.-]+", page.read_text()):
            raise AssertionError(f"{page.name} names {word}")
