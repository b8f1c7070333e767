"""What is particular to a cluster: one YAML file, the same for every submission."""

import os
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from cola_megatron.config import ConfigError, Section, load_tree, resolve_tree
from cola_megatron.config.types import NOT_BOOL, NonNegativeFloat, NonNegativeInt, PositiveInt

__all__ = [
    "Container",
    "Site",
    "bare_site",
    "check_time_limit",
    "example",
    "load_site",
    "seconds_of",
    "site_names",
    "site_without_gpus",
]

DEFAULT = "plain"
BARE = {"gpus_per_node": 0, "exclusive": False, "preflight": False}


class Container(Section):
    """The image that the processes of a job run in; `cola_megatron` is installed in it."""

    kind: Literal["pyxis", "apptainer"]
    """pyxis: Slurm's plugin for enroot; apptainer: (or singularity) started by every task."""
    image: str
    """A .sqsh or .sif file, or an address that the container system knows."""
    mounts: tuple[str, ...] = ()
    """FROM:TO of the host's folders; runs, data and the working directory must be among them, under their own names."""
    arguments: tuple[str, ...] = ()
    """Further options: of srun (pyxis), or of `apptainer exec`."""


class Site(Section):
    """How jobs are asked for and what surrounds them here. A submission keeps it, for `cola submit array --again`."""

    history = ()

    partition: str | None = None
    cpu_partition: str | None = None
    """For jobs without GPUs (preparation of data); null: `partition`."""
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    """Time limit as Slurm writes it, such as 2-00:00:00; null: the partition's."""
    gpus_per_node: NonNegativeInt = 8
    """GPUs to ask for on each node; 0: a job on CPUs."""
    gpu_type: str | None = None
    """Such as h100, where a node has several kinds."""
    gpu_option: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    """How this cluster wants to be asked for GPUs."""
    cpus_per_node: PositiveInt | None = None
    """Cores of a node that a job uses; null: whatever Slurm gives, which may be one core for each task."""
    memory_per_node: str | None = None
    """Such as 900G, or 0 for all of it."""
    exclusive: bool = True
    """No other job on the nodes."""
    directives: tuple[str, ...] = ()
    """Further options of sbatch, such as --constraint=ib."""
    modules: tuple[str, ...] = ()
    """For `module load`."""
    setup: tuple[str, ...] = ()
    """Lines of shell before anything of ours."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables of the job, such as NCCL_SOCKET_IFNAME; the values are taken literally."""
    container: Container | None = None
    python: str | None = None
    """Python of the job; null: the one that submits, in a container `python`."""
    supervisor_python: str = "python3"
    """Python 3.6 or newer of the nodes themselves, for the supervisor, which runs outside of the container."""
    launcher: Literal["agent", "tasks"] = "agent"
    """agent: srun starts one process per node, which starts one for each GPU (torchrun's agent, c10d rendezvous);
    tasks: srun starts one process for each GPU."""
    address_suffix: Annotated[str, Field(pattern=r"^[A-Za-z0-9.-]*$")] = ""
    """After the name of the first node where the others reach it under another one, such as -ib0 or .cluster.local."""
    first_port: Annotated[int, Field(ge=1024, le=65_535 - 12_000), NOT_BOOL] = 20_000
    """The processes of a job meet on one of the 12,000 ports from here on, where a firewall lets them."""
    srun_arguments: tuple[str, ...] = ()
    """Further options of every srun, such as --mpi=none or --network=..."""
    signal_seconds: Annotated[int, Field(ge=1, le=65_535), NOT_BOOL] = 300
    """The run is told so long before its time limit: longer than a step and a save."""
    tries: PositiveInt = 3
    """A job ends after so many tries in a row that brought no new checkpoint."""
    wait_seconds: PositiveInt = 300
    """srun ends what is left of a try so long after its first process has ended."""
    pause_seconds: NonNegativeFloat = 10
    """Before another try on the same nodes."""
    preflight: bool = True
    """Run `cola doctor` on all nodes before every try."""
    preflight_seconds: PositiveInt = 300
    """Time that the preflight has."""
    rendezvous_seconds: Annotated[int, Field(ge=10), NOT_BOOL] = 600
    """How long the processes of a try wait for each other."""

    @field_validator("time", mode="before")
    @classmethod
    def _quoted(cls, value: Any) -> Any:
        if isinstance(value, int):  # YAML reads 4:00:00 as a number in base 60, which Slurm would take for minutes
            raise PydanticCustomError("string_type", "Input should be text in quotes, such as '4:00:00'")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "Site":
        for directive in self.directives:
            if not directive.startswith("-") or "\n" in directive:
                raise ValueError(f"directives: {directive!r} is no option of sbatch; write it as --name=value")
        for name in self.environment:
            if not name.isidentifier():
                raise ValueError(f"environment: {name!r} is no name of a variable")
        return self


def site_without_gpus(site: Site) -> Site:
    """The same site for a job on cores, which takes no whole node."""
    return site.model_copy(update={**BARE, "partition": site.cpu_partition or site.partition})


def bare_site(directives: list[str], setup: list[str]) -> Site:
    """A site of which nothing is known but options of sbatch and lines of shell; raises ConfigError."""
    return resolve_tree(Site, {**BARE, "directives": directives, "setup": setup})


def site_names() -> list[str]:
    """The example sites that ship with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _examples().iterdir() if entry.name.endswith(".yaml"))


def example(name: str) -> str:
    """The text of an example; raises ConfigError where there is none of that name."""
    if name not in site_names():
        raise ConfigError(f"{name}: no such example; there are {', '.join(site_names())}")
    return (_examples() / f"{name}.yaml").read_text(encoding="utf-8")


def load_site(source: str | None, settings: list[str] | tuple[str, ...] = ()) -> Site:
    """A site file, or an example by its name, with `key=value` settings over it.

    Args:
        source: None takes $COLA_SITE, and without it the example `plain`.

    Raises:
        ConfigError: no such file or example, an unknown key, or an impossible value.
    """
    source = source or os.environ.get("COLA_SITE") or DEFAULT
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return load_tree(Site, path, settings)
    if source not in site_names():
        raise ConfigError(f"{source}: neither a site file nor one of the examples {', '.join(site_names())}")
    with resources.as_file(_examples() / f"{source}.yaml") as example:
        return load_tree(Site, example, settings)


def check_time_limit(site: Site) -> None:
    """Refuses a time limit that is over before it is near; raises ConfigError."""
    seconds = seconds_of(site.time or "")
    if seconds <= site.signal_seconds:
        raise ConfigError(
            f"time {site.time}: the run is told to stop signal_seconds={site.signal_seconds} before its end, so it "
            "would never train; give a longer --time, or a smaller signal_seconds"
        )


def seconds_of(limit: str) -> float:
    """Of a time limit as Slurm writes and reads it; infinite where it is none."""
    days, _, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":") if part.isdecimal()]
    if not parts or (days and not days.isdecimal()):
        return float("inf")
    if not days and len(parts) < 3:  # minutes, with seconds perhaps
        parts = [0, *parts]
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _examples():
    return resources.files("slurm") / "sites"
