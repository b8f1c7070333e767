"""A corpus that is on every machine: the documentation inside the Python installation.

The language reference topics of `pydoc` and the docstrings of the standard library, more than a megabyte of English.
The library is parsed, never imported. The documents depend on the Python version, and on nothing else.
"""

from __future__ import annotations

import ast
import functools
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from data_prep.errors import DataPrepError

__all__ = ["collect"]

SHORTEST_DOCSTRING = 200
# Tests and demonstrations hold little prose, site-packages is not part of Python, and lib2to3 and idlelib are
# absent from many distributions.
EXCLUDED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo"}
)


def _source_files(root: Path) -> Iterator[Path]:
    """Every .py file below `root` outside the excluded folders, in the order of their paths."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - EXCLUDED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


def _docstrings(path: Path) -> Iterator[str]:
    """The docstrings in one file that are long enough to be documents, in the order of the syntax tree."""
    with tokenize.open(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in the file parsed are not ours to report
        tree = ast.parse(file.read(), filename=str(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None and len(text) >= SHORTEST_DOCSTRING:
                yield text


@functools.cache
def collect() -> tuple[str, ...]:
    """The documents of the corpus, without exact duplicates, always in the same order.

    Raises:
        DataPrepError: the Python installation comes without its documentation or its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    try:
        from pydoc_data.topics import topics

        documents = [topics[name] for name in sorted(topics)]
    except ImportError as error:
        raise DataPrepError(f"embedded: this Python has no pydoc_data ({error}); give text files instead") from error
    docstrings = [text for path in _source_files(root) for text in _docstrings(path)]
    if not docstrings:
        raise DataPrepError(f"embedded: {root} holds no Python sources; give text files instead")
    return tuple(dict.fromkeys(documents + docstrings))
