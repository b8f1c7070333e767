"""`cola launch`: a command on several processes, here or as one node of many."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import typer


def launch(
    command: list[str] = typer.Argument(..., help="What every process runs, such as: train base name=first."),
    nproc: int = typer.Option(None, min=1, help="Processes on this machine; by default one for each GPU, or one."),
    nodes: int = typer.Option(1, min=1, help="Machines that take part."),
    node_rank: int = typer.Option(None, min=0, help="Number of this machine; by default $SLURM_NODEID."),
    rendezvous: str = typer.Option(
        None, help="HOST:PORT of the first machine; by default $MASTER_ADDR:$MASTER_PORT. One machine needs none."
    ),
    rendezvous_seconds: int = typer.Option(600, min=10, help="How long the machines wait for each other."),
) -> None:
    """Run a `cola` command on every GPU of this machine, or of several, with torchrun's agent.

    Batch scripts of `cola submit` start it once on every node. It ends with the exit code of the process that says
    most of why they ended, and hands signals to the processes.

    Example: `cola launch --nproc 2 train tiny stage=1 name=first data.path=data/corpus training.micro_batch_size=16`
    """
    with _quietly():
        import torch  # noqa: F401

        from launchers.agent import Node, run_processes
    from cola_megatron.config import ConfigError

    environment = os.environ
    if nodes == 1:
        # Port 0: any free one. The name of the machine may not lead to itself.
        node = Node(1, 0, "127.0.0.1:0", f"cola-{os.getpid()}", rendezvous_seconds)
    else:
        if rendezvous is None and {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
            rendezvous = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
        if node_rank is None and "SLURM_NODEID" in environment:
            node_rank = int(environment["SLURM_NODEID"])
        if rendezvous is None or node_rank is None:
            raise ConfigError(
                f"--nodes {nodes} needs --rendezvous HOST:PORT and --node-rank (on {socket.gethostname()})"
            )
        if node_rank >= nodes:
            raise ConfigError(f"--node-rank {node_rank} must be below --nodes {nodes}")
        job = f"{environment.get('SLURM_JOB_ID', 'cola')}-{rendezvous}"
        node = Node(nodes, node_rank, rendezvous, job, rendezvous_seconds)
    raise typer.Exit(run_processes(command, nproc or _gpus() or 1, node))


@contextmanager
def _quietly() -> Iterator[None]:
    """Of a store that is lost torch writes a trace of its C++ for every thread that notices; ours is one line.

    It takes this from the environment when it is loaded, which happens here; the ranks keep its errors.
    """
    name = "TORCH_CPP_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ[name] = before or "FATAL"
    try:
        yield
    finally:
        os.environ[name] = before or "ERROR"


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
