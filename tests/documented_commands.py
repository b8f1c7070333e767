"""Commands that pages and helps show, and whether the real command line takes them, without running any.

A command in a fenced block is held to all of it: options, their types, what is required. One inside a line of text may
leave things out (`cola plan --eflops 2000`) and name places in capitals (`cola eval RUN`).
"""

import argparse
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from cola_megatron.config import load_config, preset_names
from cola_megatron.training.batches import micro_batches_per_step
from launchers.cli import app
from launchers.prep_recipes import from_file
from launchers.sweep_files import study_file

ROOT = Path(__file__).resolve().parents[1]

PROGRAMS = ("cola", "make", "python", "python3", "torchrun", "pytest", "bash", "sbatch", "apt-get", "export", ".ci/run")
PROGRAM = re.compile(
    rf"(?:\$ )?(?:[A-Z_]+=\S* )*(?:timeout (?:\S+ )*?\d+ )?(?:\S+/bin/)?(?:{'|'.join(PROGRAMS)})(?: |$)"
)
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Shown:
    """A command as it is written somewhere."""

    place: str
    text: str
    is_whole: bool

    @property
    def words(self) -> list[str]:
        """Its words without what a shell takes for itself: variables before it, `timeout`, comments, redirections."""
        words = shlex.split(self.text.removeprefix("$ "), comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words and words[0] == "timeout":
            words = words[next(i for i, word in enumerate(words[1:], 1) if word.isdigit()) + 1 :]
        ends = (i for i, word in enumerate(words) if word in ("|", ">", "2>&1", "&&", ";", "..."))
        words = words[: next(ends, len(words))]
        return [re.sub(r"^\S+/bin/", "", words[0]), *words[1:]] if words else []


def shown_on(page: Path) -> list[Shown]:
    """Commands of a page, those of its fenced blocks first."""
    text = page.read_text(encoding="utf-8")
    found = []
    for language, block in FENCE.findall(text):
        lines = [line.strip() for line in block.replace("\\\n", " ").splitlines()]
        for line in lines:
            if language == "bash":
                is_command = line != "" and not line.startswith("#")
            else:
                is_command = language == "" and PROGRAM.match(line) is not None
                is_command |= language == "text" and line.startswith("$ ")
            if is_command:
                found.append(Shown(page.name, line, is_whole=True))
    rest = FENCE.sub("", text)
    for code in re.findall(r"`([^`]+)`", rest):
        line = re.sub(r"\s+", " ", code.replace("\\|", "|"))
        if PROGRAM.match(line):
            found.append(Shown(page.name, line, is_whole=False))
    return found


# ---- the command line --------------------------------------------------------------------------------------------


@cache
def command_line() -> Any:
    """The command group of `cola` with callbacks that return what they are given, and run nothing."""
    group = typer.main.get_command(app)
    for path, leaf in leaves(group):
        leaf.callback = lambda path=path, **parameters: (path, parameters)
    return group


def leaves(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command below a group, with the words that lead to it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from leaves(command, (*path, name))
        else:
            yield (*path, name), command


def groups(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every group of commands below a group."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield (*path, name), command
            yield from groups(command, (*path, name))


def parse(words: list[str], is_whole: bool = True) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Path and parameters of `cola WORDS`; raises click's UsageError for what the command line refuses."""
    group = command_line()
    if is_whole:
        return group.main(list(words), prog_name="cola", standalone_mode=False)
    command, path, rest = group, (), list(words)
    while rest and hasattr(command, "commands") and rest[0] in command.commands:
        path = (*path, rest[0])
        command = command.commands[rest.pop(0)]
    if not rest:
        return path, {}
    parameters = [each for _, leaf in leaves(group) for each in leaf.params if each.required]
    for each in parameters:
        each.required = False
    value = ["1"] if words[-1].startswith("--") and takes_a_value(group, path, words[-1]) else []
    try:
        return group.main([*words, *value], prog_name="cola", standalone_mode=False)
    finally:
        for each in parameters:
            each.required = True


def takes_a_value(group: Any, path: tuple[str, ...], option: str) -> bool:
    """Whether an option of the command at this path is named without the value that it needs."""
    parameters = dict(leaves(group))[path].params if path in dict(leaves(group)) else []
    return any(option in each.opts and not each.is_flag for each in parameters if hasattr(each, "is_flag"))


def without_places(words: list[str]) -> list[str]:
    """With something that can be read in place of the names in capitals that stand for it."""
    standing_for = {"PRESET": "tiny", "CONFIG": "tiny", "NUMBER": "0", "STUDY": "rq4", "N": "1"}
    return [standing_for.get(word, word) for word in words]


def check(shown: Shown, files: frozenset[str] = frozenset()) -> None:
    """Raises what is wrong with a shown command; `files` are those that its page says how to write."""
    words = without_places(shown.words)
    match words:
        case ["cola", *rest]:
            check_cola(rest, shown.is_whole, files)
        case ["make", *rest]:
            check_make(rest)
        case ["python" | "python3", "-m", "pytest", *rest] | ["pytest", *rest]:
            check_pytest(rest)
        case ["python" | "python3", "-m", module, *rest] if module.startswith("tools."):
            check_tool(module, rest)
        case ["torchrun", *rest] if "-m" in rest:
            processes = int(rest[rest.index("--nproc-per-node") + 1])
            module, *rest = rest[rest.index("-m") + 1 :]
            check_tool(module, rest)
            if module == "cola_megatron":
                check_processes(rest, processes, 1)


def check_cola(words: list[str], is_whole: bool = True, files: frozenset[str] = frozenset()) -> None:
    """Parses it, and looks up presets, keys, studies and recipes that it names."""
    if not words or words == ["--help"] or words[-1] == "--help":
        parse([word for word in words if word != "--help"], is_whole=False)
        return
    path, given = parse(words, is_whole)
    if path == ("launch",) and given:
        check_cola(given["command"], is_whole, files)
        check_processes(given["command"], given["nproc"], given["nodes"])
    overrides = list(given.get("overrides") or [])
    source = given.get("source")
    if path[0] == "sweep" and path[-1] != "coordinates":
        if source is not None and source not in files:
            assert study_file(source).is_file(), source
    elif path[0] == "prep":
        recipe = given.get("recipe")
        if recipe is not None and recipe.name not in files:
            from_file(recipe, overrides or list(given.get("inputs") or []), None)
    elif source is not None:
        check_config(source, overrides, files)
        if path == ("train",) and is_whole and source in preset_names():
            assert any(each.startswith("data.path=") for each in overrides), "a preset has no data.path"
    if given.get("against") and path == ("config",):
        load_config(given["against"])
    if path == ("submit", "pipeline") and given.get("recipe") and given["recipe"].name not in files:
        from_file(given["recipe"], [], None)
    for line in given.get("run") or () if path == ("submit", "array") else ():
        check_config(source, [*overrides, *(word for word in line.split()[1:] if "=" in word)], files)


def check_processes(words: list[str], processes: int | None, nodes: int) -> None:
    """Of a training under `cola launch`: its batch divides over its replicas."""
    path, given = parse(words, is_whole=False)
    if path == ("train",) and given.get("source") in preset_names():
        config = load_config(given["source"], given["overrides"])
        replicas, rest = divmod((processes or 1) * nodes, config.parallel.ranks_of_a_replica)
        assert rest == 0, "the layout does not divide the processes"
        micro_batches_per_step(config, replicas)


def check_config(source: str, overrides: list[str], files: frozenset[str]) -> None:
    """A file of the reader's own may be of any family: its overrides are keys of one of them at least."""
    if source in preset_names():
        load_config(source, overrides)
    elif source not in files:
        assert "/" in source and source.endswith(".yaml"), f"{source} is no preset and no file that the page speaks of"
        load_config("paper-2b", overrides)


def check_make(words: list[str]) -> None:
    """Targets and variables are those of the Makefile, extras those of the package."""
    makefile = (ROOT / "Makefile").read_text()
    extras = re.search(r"\[project\.optional-dependencies\](.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    for word in words:
        name, assigned, value = word.partition("=")
        if not assigned:
            assert re.search(rf"^{re.escape(name)}:", makefile, re.MULTILINE), f"make has no target {name}"
            continue
        assert re.search(rf"^{name} \?=", makefile, re.MULTILINE), f"the Makefile has no variable {name}"
        if name == "EXTRAS":
            known = set(re.findall(r"^(\w+) = \[", extras[1], re.MULTILINE))
            assert set(value.split(",")) <= known, f"{word}: known are {sorted(known)}"


def check_pytest(words: list[str]) -> None:
    """Files are there, and every word of `-k` is part of the name of a test in them."""
    files = [ROOT / word for word in words if word.startswith("tests/")]
    for file in files:
        assert file.is_file(), f"there is no {file.name}"
    if "-k" in words:
        text = "".join(file.read_text() for file in files)
        names = re.findall(r"def (test_\w+)", text)
        for word in re.findall(r"\w+", words[words.index("-k") + 1]):
            assert word in ("or", "and", "not") or any(word in name for name in names), f"no test's name has {word}"


def check_tool(module: str, words: list[str]) -> None:
    """Its own parser reads them, and presets that they name are there."""
    if module == "cola_megatron":
        check_cola(words)
        return
    if not words or "--help" in words:
        assert importlib.util.find_spec(module), f"there is no {module}"
        return
    given = parsed_by(importlib.import_module(module), words)
    values = [each for value in vars(given).values() for each in (value if isinstance(value, list) else [value])]
    sources = [value for value in values if value in preset_names()]
    for source in sources[:1]:
        load_config(source, [value for value in values if re.match(r"[a-z_]+\.[a-z_.]+=", str(value))])


def parsed_by(module: ModuleType, words: list[str]) -> argparse.Namespace:
    """What the parser of a module's `main` makes of the words; nothing behind it runs."""

    class Parsed(Exception):
        pass

    def parse_args(parser: argparse.ArgumentParser, args: Any = None) -> None:
        given, unknown = parser.parse_known_intermixed_args(words)
        assert not unknown, f"{module.__name__} does not know {' '.join(unknown)}"
        raise Parsed(given)

    def refuse(parser: argparse.ArgumentParser, message: str) -> None:
        raise AssertionError(f"{module.__name__}: {message}")

    with pytest.MonkeyPatch.context() as patched:
        for name in ("parse_args", "parse_intermixed_args"):
            patched.setattr(argparse.ArgumentParser, name, parse_args)
        patched.setattr(argparse.ArgumentParser, "error", refuse)
        patched.setattr(sys, "argv", [module.__name__, *words])
        try:
            module.main()
        except Parsed as found:
            return found.args[0]
    raise AssertionError(f"{module.__name__} has read no arguments")
