"""What the type checker is told, and what it cannot see for itself."""

import ast
import inspect
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

from cola_megatron.parallel import marks_of, megatron

ROOT = Path(__file__).resolve().parents[1]


def test_the_strict_packages_have_all_that_mypy_calls_strict() -> None:
    one_line = os.environ | {"COLUMNS": "10000"}
    command = [sys.executable, "-m", "mypy", "--help"]
    usage = subprocess.run(command, env=one_line, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in usage.splitlines() if "Strict mode; enables the following flags:" in line]
    strict = {flag.strip().removeprefix("--").replace("-", "_") for flag in line.split("flags:")[1].split(",")}
    assert {"disallow_untyped_defs", "warn_return_any"} <= strict
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    (packages,) = [each for each in settings["overrides"] if "cola_megatron.layers.*" in each["module"]]
    assert {flag for flag in strict if (settings | packages).get(flag) is not True} == set()


def test_the_stub_of_megatron_core_names_what_there_is() -> None:
    stub = ast.parse(Path(megatron.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    named = {}
    for statement in stub.body:
        if isinstance(statement, ast.FunctionDef):
            named[statement.name] = statement.args
        elif isinstance(statement, ast.ClassDef):
            makers = [each for each in statement.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
            named[statement.name] = makers[0].args if makers else None
        elif isinstance(statement, ast.AnnAssign):
            named[ast.unparse(statement.target)] = None
    assert {name for name in named if not name.startswith("_")} == set(megatron.__all__)
    for name, arguments in named.items():
        if arguments is not None:
            wanted = [each.arg for each in (*arguments.args, *arguments.kwonlyargs) if each.arg != "self"]
            taken = inspect.signature(getattr(megatron, name)).parameters
            assert set(wanted) <= set(taken), name


def test_a_parameter_that_nobody_marked_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^a parameter of shape \(2, 3\) was not marked: its layer calls mark_"):
        marks_of(nn.Parameter(torch.zeros(2, 3)))
