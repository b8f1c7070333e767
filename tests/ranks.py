"""Real multi-process runs: ranks are forked from a server that has imported the heavy libraries once."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import random
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cola_megatron.errors import UserError

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["tests.ranks_preload"])


def run_ranks(function: Callable, world_size: int, *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """Runs `function(*arguments)` in `world_size` processes of one gloo job and returns each rank's result.

    Raises:
        RuntimeError: a rank failed (with its traceback) or did not end in time.
    """
    port, results = free_port(), FORKED.Queue()
    ranks = [
        FORKED.Process(target=_rank, args=(rank, world_size, port, results, function, arguments), daemon=False)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        answers: dict[int, Any] = {}
        while len(answers) < world_size:
            rank, value, error = results.get(timeout=timeout)
            if error is not None:
                raise RuntimeError(f"rank {rank} of {world_size} failed:\n{error}")
            answers[rank] = value
        return [answers[rank] for rank in range(world_size)]
    finally:
        for process in ranks:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


@dataclass(frozen=True)
class RankEnd:
    """How one rank of `ends_of_ranks` ended."""

    exit_code: int
    """Negative: the signal that killed it."""
    errors: str
    """What it wrote to stderr."""
    at: float
    """When, on the clock of `time.monotonic`."""

    @property
    def last_line(self) -> str:
        return self.errors.strip().splitlines()[-1] if self.errors.strip() else ""


def ends_of_ranks(
    function: Callable, world_size: int, *arguments: Any, stopped: tuple[int, ...] = (), timeout: float = 60.0
) -> list[RankEnd]:
    """Runs `function(*arguments)` like `run_ranks`, but lets ranks die: returns how each of them ended.

    A `UserError` is printed as the command line prints it. Ranks that stop themselves are named by `stopped`; they are
    killed when the others have ended, and so is every rank that runs for longer than `timeout`.
    """
    port, ended_at = free_port(), {}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"rank_{rank}" for rank in range(world_size)]
        ranks = [
            FORKED.Process(target=_mortal_rank, args=(rank, world_size, port, outputs[rank], function, arguments))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        running = {process.sentinel: rank for rank, process in enumerate(ranks)}
        until = time.monotonic() + timeout
        while set(running.values()) - set(stopped) and time.monotonic() < until:
            for sentinel in multiprocessing.connection.wait(list(running), until - time.monotonic()):
                ended_at[running.pop(sentinel)] = time.monotonic()
        for rank in running.values():
            ranks[rank].kill()
            ended_at[rank] = time.monotonic()
        for process in ranks:
            process.join()
        return [
            RankEnd(process.exitcode, output.read_text() if output.exists() else "", ended_at[rank])
            for rank, (process, output) in enumerate(zip(ranks, outputs, strict=True))
        ]


def _mortal_rank(rank: int, world_size: int, port: int, output: Path, function: Callable, arguments: tuple) -> None:
    _join_job(rank, world_size, port)
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 2)
    code = 1
    try:
        function(*arguments)
        code = 0
    except UserError as error:
        print(f"cola: {error}", file=sys.stderr)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads of a failed job would keep the process


def _rank(rank: int, world_size: int, port: int, results, function: Callable, arguments: tuple) -> None:
    _join_job(rank, world_size, port)
    try:
        results.put((rank, function(*arguments), None))
    except BaseException:  # whatever it was, the parent reports it
        results.put((rank, None, traceback.format_exc()))
    results.close()
    results.join_thread()
    os._exit(0)  # gloo's threads of a failed job would keep the process


def _join_job(rank: int, world_size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )


def free_port() -> int:
    """None that the system hands out (from 32768), nor one of Slurm's jobs (from 20000): nobody takes it before us."""
    while True:
        port = random.SystemRandom().randrange(10_000, 18_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
