"""The benchmark of saves: both forms save the same bytes in one run, and nothing stays behind."""

import json
import subprocess
import sys
from pathlib import Path

from tests.support import TINY


def bench(folder: Path, *options: str) -> str:
    command = [sys.executable, "-m", "tools.bench_checkpoint", "tiny", *TINY, "--folder", str(folder), *options]
    done = subprocess.run([*command, "--saves", "2", "--steps", "1"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not any(folder.iterdir()), "its checkpoints are removed"
    return done.stdout


def test_every_figure_is_there(tmp_path: Path) -> None:
    printed = bench(tmp_path, "--json")
    found = json.loads(printed[printed.index("{\n") :])
    assert found["ratio"]["synchronous"] == 1.0
    assert found["gigabytes"] > 0 and found["writing"] > 0 and found["steps_beside_a_write"] >= 2
    for form in ("synchronous", "asynchronous"):
        assert len(found["all_blocked"][form]) == 2 and min(found["all_blocked"][form]) > 0
