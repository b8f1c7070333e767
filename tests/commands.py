"""`cola ...` as a process of its own that starts at once: forked, like the ranks of `tests.ranks`, with the heavy
libraries imported already.

What a test says about the start of a process itself (its imports, what it prints before it reads its arguments) needs
a real one: `subprocess` and `sys.executable -m launchers.cli`.
"""

import atexit
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

from tests.ranks import FORKED


class Command:
    """A running command; its methods and attributes are those of `subprocess.Popen`, of which it has what tests use."""

    def __init__(self, arguments: tuple[object, ...], env: dict[str, str] | None = None):
        self.args = ["cola", *map(str, arguments)]
        self._folder = Path(tempfile.mkdtemp(prefix="cola-"))
        place = (self._folder, os.getcwd(), dict(os.environ if env is None else env))
        self._process: multiprocessing.Process = FORKED.Process(target=_run, args=(self.args, *place))
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """To this process alone; `os.killpg(pid)` reaches its children too."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 120.0) -> tuple[str, str]:
        """(stdout, stderr), when it has ended."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            self._process.join()
            raise subprocess.TimeoutExpired(self.args, timeout, *self._output())
        return self._output()

    def _output(self) -> tuple[str, str]:
        files = [self._folder / name for name in ("stdout", "stderr")]
        texts = tuple(file.read_text() if file.exists() else "" for file in files)
        shutil.rmtree(self._folder, ignore_errors=True)
        return texts


def cola(*arguments: object, env: dict[str, str] | None = None, timeout: float = 120.0) -> subprocess.CompletedProcess:
    """Runs `cola ARGUMENTS` here, to its end."""
    command = Command(arguments, env)
    output = command.communicate(timeout)
    return subprocess.CompletedProcess(command.args, command.returncode, *output)


def _run(words: list[str], output: Path, folder: str, environment: dict[str, str]) -> None:
    os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    warnings.simplefilter("ignore")
    sys.argv = words
    code: object = 0
    try:
        from launchers.cli import main

        main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        stream.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)
