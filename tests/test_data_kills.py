"""A preparation that is killed again and again ends with the bytes of one that was left in peace."""

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from tests.commands import Command


def start(recipe: Path, output: Path) -> Command:
    """Forked: every kill hits the preparation, none the imports before it."""
    return Command(("prep", "run", "--recipe", recipe, "--output", output, "--workers", 2))


def finish(recipe: Path, output: Path) -> None:
    process = start(recipe, output)
    printed = process.communicate(timeout=240)
    assert process.returncode == 0, printed


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_session(leader: int) -> list[psutil.Process]:
    """The living processes that a command has started, itself included."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_process_that_started_them(tmp_path: Path, number: signal.Signals) -> None:
    pytest.importorskip("datatrove", reason="its work is slow enough")
    words = [f"word{number}" for number in range(5000)]
    for part in range(7):
        chooser = random.Random(part)
        texts = (" ".join(chooser.choices(words, k=500)) for _ in range(300))
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tree = {
        "output": str(tmp_path / "unused"),
        "sources": [{"name": "one", "inputs": [str(tmp_path / "*.jsonl")]}],
        "deduplication": {"near": {}},
        "task_bytes": 100_000,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    process = start(tmp_path / "recipe.yaml", tmp_path / "out")
    try:
        clean = tmp_path / "out.work" / "clean"
        waited(lambda: clean.is_dir() and any(clean.iterdir()))
        assert len(in_session(process.pid)) > 2, "workers at work"
        process.send_signal(number)
        waited(lambda: not in_session(process.pid))
        assert sum(path.name.isdecimal() for path in clean.iterdir()) < 7, "they did not go on to the end"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def waited(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Waits until it holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.02)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Two sources in many parts, cleaned and deduplicated: every step has tasks."""
    chooser = random.Random(0)
    words = "the a of and to in that have with be on for it was as at by from this which or an".split()  # noqa: SIM905
    names = [f"word{number}" for number in range(500)]
    texts = [
        " ".join(chooser.choice(words if chooser.random() < 0.5 else names) for _ in range(120)) + "."
        for _ in range(900)
    ]
    texts += texts[:50]
    for name, part in (("one", texts[:500]), ("two", texts[500:])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    tree = {
        "output": str(tmp_path / "unused"),
        "sources": [{"name": name, "inputs": [str(tmp_path / f"{name}.jsonl")]} for name in ("one", "two")],
        "cleaning": {"length": {"minimum_characters": 10}},
        "deduplication": {"exact": True},
        "tokenizer": {"vocab_size": 700},
        "packing": {"sequence_length": 64},
        "shards": {"size_bytes": 8192},
        "task_bytes": 50_000,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize("most", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_kills_change_no_byte(tmp_path: Path, recipe: Path, most: int) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    began = time.monotonic()
    finish(recipe, undisturbed)
    seconds = time.monotonic() - began
    chooser, kills = random.Random(time.time_ns()), 0
    while kills < most:
        process, until = start(recipe, killed), time.monotonic() + chooser.uniform(0.3, 0.8) * seconds
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
        if killed.exists():
            break  # finished between two kills: what is left is to compare
    finish(recipe, killed)
    assert content(killed) == content(undisturbed)
    assert not killed.with_name("killed.work").exists()
