"""The documentation says what is there: settings, links, paths, functions, rows of imports."""

import ast
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cola_megatron.training.checkpoint import FREE_KEYS
from tools import config_reference
from tools.config_reference import Origin

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cola_megatron"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("README.md")])

# Top-level folders whose paths a page may name; `runs/`, `data/`, `exports/` are examples of a reader's own.
SOURCE_FOLDERS = ("cola_megatron", "data_prep", "docs", "launchers", "slurm", "tests", "tools")
SUFFIXES = (".py", ".md", ".svg", ".png", ".sbatch.j2", ".html.j2")

# From the top: a row may import from itself and from the rows below it.
ROWS = (
    ("launchers",),
    ("tools", "data_prep", "slurm"),
    ("interface.py",),
    ("training", "evaluation", "preflight"),
    ("inference", "interop", "data", "scaling"),
    ("models", "objectives"),
    ("layers",),
    ("parallel",),
    ("config", "errors.py"),
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


def test_the_lists_of_the_reference_name_keys_that_exist():
    keys = [row.key for name, model in config_reference.sections() for row in config_reference.rows(name, model)]
    for entry in config_reference.PUBLISHED + config_reference.OURS:
        assert any(key == entry or key.startswith(f"{entry}.") for key in keys), entry
    documented = {
        f"{name}.{field}".lstrip(".")
        for name, model in config_reference.sections()
        for field in config_reference.field_docstrings(model)
    }
    for key in config_reference.MEANINGS:
        assert key in keys, f"{key} is gone"
        assert key not in documented, f"{key} has a docstring: drop it from MEANINGS"


def test_what_a_docstring_calls_ours_is_marked_ours():
    for name, model in config_reference.sections():
        for row in config_reference.rows(name, model):
            if "; ours" in row.meaning:
                assert row.origin is Origin.OURS, row.key
    published = [config_reference.origin(key) for key in ("seed", "model.dit.block_size", "training.optimizer.clip")]
    assert set(published) == {Origin.PUBLISHED}


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


def test_the_free_keys_of_a_checkpoint_are_listed():
    section = ARCHITECTURE.read_text(encoding="utf-8").split("Free, because")[1]
    assert set(re.findall(r"`([\w.]+)`", section)) == set(FREE_KEYS)


# ---- the house ------------------------------------------------------------------------------------------------------


def row_of(path: Path) -> int | None:
    """Row of a source file, counted from the top; None for the package's own __init__ and the start of the command."""
    top, *rest = path.relative_to(ROOT).parts
    name = rest[0] if top == "cola_megatron" else top
    found = [index for index, row in enumerate(ROWS) if name in row]
    if not found and name not in ("__init__.py", "__main__.py", "command.py"):
        raise AssertionError(f"{path.relative_to(ROOT)} stands in no row")
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


def test_imports_point_downwards():
    sources = [
        path for name in ("cola_megatron", "data_prep", "launchers", "tools") for path in (ROOT / name).rglob("*.py")
    ]
    assert len(sources) > 60
    for path in sources:
        own = row_of(path)
        for other in imported(path):
            theirs = row_of(other)
            if own is not None and theirs is not None:
                assert theirs >= own, f"{path.relative_to(ROOT)} imports {other.relative_to(ROOT)}, which is above it"


def test_the_picture_shows_the_rows():
    picture = ElementTree.parse(ROOT / "docs" / "architecture.svg")
    spans = [span.text for span in picture.iter("{http://www.w3.org/2000/svg}tspan") if span.get("class") == "name"]
    there = [name for row in ROWS for name in row if any(row_exists(name))]
    assert spans == there


def row_exists(name: str) -> list[bool]:
    """Whether a name of `ROWS` is a file, or a package with code, here."""
    places = (ROOT / name, PACKAGE / name)
    return [place.is_file() or any(place.glob("*.py")) for place in places]


def test_pages_name_no_place_of_this_machine():
    for page in PAGES:
        for word in re.findall(r"(?<![\w.:/])/(?:home|root|work|tmp|mnt|usr)/[\w/.-]+", page.read_text()):
            raise AssertionError(f"{page.name} names {word}")
