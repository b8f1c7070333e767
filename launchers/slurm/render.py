"""Batch scripts from the templates in `slurm/`."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from launchers.slurm.site import Site

__all__ = ["Shape", "cola_command", "container_command", "render", "training_script"]


@dataclass(frozen=True)
class Shape:
    """How many nodes and processes a job has."""

    nodes: int
    processes: int
    """On each node."""

    @property
    def world_size(self) -> int:
        """Processes of the whole job."""
        return self.nodes * self.processes


def render(template: str, **values: Any) -> str:
    """A template of `slurm/` filled in; a value that it misses is an error, and `| shell` quotes."""
    environment = Environment(
        loader=PackageLoader("slurm", ""), undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    environment.filters["shell"] = lambda value: shlex.quote(str(value))
    # A value that begins with = would look like a slip, so variables are quoted always.
    environment.filters["quoted"] = lambda value: "'" + str(value).replace("'", "'\\''") + "'"
    return environment.get_template(template).render(values)


def training_script(site: Site, shape: Shape, name: str, folder: Path, working: Path, array: str | None = None) -> str:
    """The script that trains the config of a submission folder.

    Args:
        working: where relative paths of the config begin.
        array: elements as Slurm writes them, such as 0-3%2; `folder` then holds a link for each in `elements/`.
    """
    # Of its time the preflight of agents gives half to the wait for all nodes and a third to the checks, so that each
    # ends in time to name who did not answer; without agents the checks begin with the wait.
    thirds = 1 if site.launcher == "agent" else 2
    return render(
        "train.sbatch.j2",
        site=site,
        preflight_rendezvous_seconds=max(10, min(site.preflight_seconds // 2, site.rendezvous_seconds)),
        doctor_seconds=site.preflight_seconds * thirds // 3,
        name=name,
        nodes=shape.nodes,
        processes=shape.processes,
        resources=[*_resources(site, shape, working), *([f"--array={array}"] if array is not None else [])],
        threads=max(1, (site.cpus_per_node or shape.processes) // shape.processes),
        folder=folder,
        array=None if array is None else folder,
        log=folder / ("slurm-%j.log" if array is None else "slurm-%A_%a.log"),
        step=_step(site, shape),
        cola=cola_command(site),
    )


def cola_command(site: Site) -> str:
    """The words that begin a command of ours on a node, quoted for the shell; inside the container with pyxis."""
    python = site.python or ("python" if site.container is not None else sys.executable)
    return " ".join(map(shlex.quote, [*_apptainer(site), python, "-m", "cola_megatron"]))


def container_command(site: Site, command: list[str]) -> str:
    """One of our commands for a batch script of one task, in the container of the site, quoted for the shell."""
    words = " ".join(map(shlex.quote, command))
    started = f"{cola_command(site)} {words}"
    pyxis = _pyxis(site)
    return " ".join(["srun", "--ntasks=1", "--export=ALL", *map(shlex.quote, pyxis), started]) if pyxis else started


def gpu_directives(site: Site, gpus: int) -> list[str]:
    """How this site wants to be asked for so many GPUs on each node."""
    if gpus == 0:
        return []
    kind = f"{site.gpu_type}:" if site.gpu_type else ""
    return [f"--gres=gpu:{kind}{gpus}" if site.gpu_option == "gres" else f"--gpus-per-node={kind}{gpus}"]


def _resources(site: Site, shape: Shape, working: Path) -> list[str]:
    tasks = shape.processes if site.launcher == "tasks" else 1
    found = [f"--chdir={working}", f"--nodes={shape.nodes}", f"--ntasks-per-node={tasks}"]
    if site.cpus_per_node is not None:
        found.append(f"--cpus-per-task={site.cpus_per_node // tasks}")
    if site.memory_per_node is not None:
        found.append(f"--mem={site.memory_per_node}")
    found += gpu_directives(site, site.gpus_per_node)
    return [*found, "--exclusive"] if site.exclusive else found


def _step(site: Site, shape: Shape) -> list[str]:
    """The words of srun. It ends only those tasks that the first failure leaves behind: the ranks end by themselves."""
    tasks = shape.processes if site.launcher == "tasks" else 1
    words = ["srun", f"--nodes={shape.nodes}", f"--ntasks-per-node={tasks}", "--kill-on-bad-exit=0"]
    # What the script sets reaches the processes, also where the site hands jobs no environment (--export=NONE).
    words += [f"--wait={site.wait_seconds}", "--export=ALL"]
    # Slurm's steps do not inherit the cores of the job.
    words.append(f"--cpus-per-task={site.cpus_per_node // tasks}" if site.cpus_per_node else "--cpu-bind=none")
    return [*words, *site.srun_arguments, *_pyxis(site)]


def _pyxis(site: Site) -> list[str]:
    container = site.container
    if container is None or container.kind != "pyxis":
        return []
    mounts = [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []
    return [f"--container-image={container.image}", *mounts, *container.arguments]


def _apptainer(site: Site) -> list[str]:
    container = site.container
    if container is None or container.kind != "apptainer":
        return []
    gpus = ["--nv"] if site.gpus_per_node else []
    binds = [word for mount in container.mounts for word in ("--bind", mount)]
    return ["apptainer", "exec", *gpus, *binds, *container.arguments, container.image]
