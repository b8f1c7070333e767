"""Real multi-process runs: ranks are forked from a server that has imported the heavy libraries once."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.ranks_preload"])


def run_ranks(function: Callable, world_size: int, *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """Runs `function(*arguments)` in `world_size` processes of one gloo job and returns each rank's result.

    Raises:
        RuntimeError: a rank failed (with its traceback) or did not end in time.
    """
    port, results = _free_port(), _context.Queue()
    ranks = [
        _context.Process(target=_rank, args=(rank, world_size, port, results, function, arguments), daemon=False)
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


def _rank(rank: int, world_size: int, port: int, results, function: Callable, arguments: tuple) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    try:
        results.put((rank, function(*arguments), None))
    except BaseException:  # whatever it was, the parent reports it
        results.put((rank, None, traceback.format_exc()))
    results.close()
    results.join_thread()
    os._exit(0)  # gloo's threads of a failed job would keep the process


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
