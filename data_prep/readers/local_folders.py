"""What lies below a local folder, each real folder once: links are followed, and no circle of them is."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.errors import DataPrepError

__all__ = ["Below", "matches_of", "walk"]

ANY_DEPTH = "**"


@dataclass(slots=True)
class Below:
    """What a walk found, by absolute path."""

    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    """The one that was walked among them."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Hidden names and links to folders that are walked by another name, with the reason."""


def walk(folder: str) -> Below:
    """Everything below a folder; raises DataPrepError where some of it cannot be listed.

    Folders come before links, so that of a folder and a link to it the folder is walked.
    """

    def refuse(error: OSError) -> None:
        raise DataPrepError(f"{error.filename}: cannot be listed ({error.strerror}); check its rights") from error

    below = Below()
    top = os.path.realpath(folder)
    walked: dict[str, str] = {}
    waiting = deque([folder])
    while waiting:
        begin = waiting.popleft()
        real = os.path.realpath(begin)
        if real in walked:
            below.left_out[begin] = f"a link to {walked[real]}, which is read by that name"
            continue
        if begin != folder and Path(top).is_relative_to(real):
            below.left_out[begin] = "a link to a folder around it"
            continue
        for parent, subfolders, names in os.walk(begin, onerror=refuse):
            own = os.path.normpath(os.path.join(real, os.path.relpath(parent, begin)))
            if own in walked:  # a link that was followed before leads there
                below.left_out[parent] = f"a link leads there, and it is read as {walked[own]}"
                subfolders.clear()
                continue
            walked[own] = parent
            hidden = [name for name in [*subfolders, *names] if name[0] == "."]
            below.left_out |= {os.path.join(parent, name): "hidden" for name in hidden}
            seen = sorted(name for name in subfolders if name[0] != ".")
            links = [name for name in seen if os.path.islink(os.path.join(parent, name))]
            waiting += [os.path.join(parent, name) for name in links]
            subfolders[:] = [name for name in seen if name not in links]
            below.folders.append(parent)
            below.files += [os.path.join(parent, name) for name in names if name[0] != "."]
    below.files.sort()
    return below


def matches_of(pattern: str) -> tuple[list[str], dict[str, str]]:
    """What a glob stands for, sorted, and what it would show by way of links alone, with the reason.

    A link that leads nowhere is matched: opening it says what is wrong.
    """
    parts = pattern.split("/")
    if ANY_DEPTH not in parts:
        return sorted(glob.glob(pattern)), {}
    # `glob` goes round in circles of links below `**`.
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    found: set[str] = set()
    left_out: dict[str, str] = {}
    tops = ["/".join(parts[:first]) or "/"]
    if parts[first] != ANY_DEPTH:
        first = parts.index(ANY_DEPTH)
        tops = [each for each in sorted(glob.glob("/".join(parts[:first]))) if os.path.isdir(each)]
    for top in filter(os.path.isdir, tops):
        below = walk(top)
        left_out |= below.left_out
        for location in [*below.files, *below.folders]:
            inside = os.path.relpath(location, top)
            if _fits([] if inside == "." else inside.split("/"), parts[first:]):
                found.add(location)
    return sorted(found), {location: why for location, why in left_out.items() if why != "hidden"}


def _fits(parts: list[str], pattern: list[str]) -> bool:
    if not pattern or pattern == [""]:
        return not parts
    if pattern[0] == ANY_DEPTH:
        return any(_fits(parts[number:], pattern[1:]) for number in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])
