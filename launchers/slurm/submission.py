"""A submission: a folder that holds all that a job was made of, and the job."""

import os
import re
import sys
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path

from cola_megatron.config import ConfigError, RunConfig, dump_config
from cola_megatron.records.provenance import git
from launchers.slurm import commands
from launchers.slurm.render import Shape, training_script
from launchers.slurm.site import Site

__all__ = ["SCRIPT", "SUBMISSIONS", "Submission", "check_layout", "check_name", "shape_of", "write", "write_training"]

SUBMISSIONS, SCRIPT, JOB = "submissions", "job.sbatch", "job_id"
ELEMENTS = "elements"
"""In the folder of an array: a link for each element, to its submission folder."""
# The environment is stored beside the run: of what may decide how it goes the values, of all else the names.
SHOWN = re.compile(
    "(COLA|SLURM|SBATCH|CUDA|NCCL|TORCH|PYTORCH|GLOO|UCX|FI|OMP|MKL|OMPI|PMIX|LC)_|"
    "(PATH|LD_LIBRARY_PATH|LD_PRELOAD|PYTHON[A-Z]+|VIRTUAL_ENV|CONDA_(PREFIX|DEFAULT_ENV)|LOADEDMODULES|LANG|SHELL|TMPDIR|"
    "HOME|USER|LOGNAME|HOSTNAME|PWD|HF_HOME|TOKENIZERS_PARALLELISM|WANDB_(MODE|PROJECT|ENTITY))$"
)
SECRET = re.compile("KEY|TOKEN|SECRET|PASS|PWD.|CREDENTIAL|AUTH|JWT|COOKIE")
SECRET_VALUE = re.compile("://[^/@]*:[^/@]*@")


@dataclass(frozen=True)
class Submission:
    """A written batch script."""

    folder: Path
    run_folder: Path
    signal_seconds: int
    """Of the site: what the time limit has to exceed."""

    @property
    def script(self) -> Path:
        """What sbatch takes."""
        return self.folder / SCRIPT

    @property
    def log(self) -> str:
        """Where the job writes, once it has an id."""
        return str(self.folder / "slurm-*.log")

    def validate(self) -> str:
        """What `sbatch --test-only` says; raises SlurmError."""
        return commands.test_only(str(self.script))

    def submit(self, after: list[str] | tuple[str, ...] = ()) -> str:
        """Hands the script to Slurm and notes the job's id in the folder; raises SlurmError."""
        return commands.submit(self.script, self.folder / JOB, after, self.signal_seconds)


def shape_of(site: Site, nodes: int, processes: int | None) -> Shape:
    """So many nodes, and on each so many processes: by default one for each GPU, or one."""
    if processes is not None and site.gpus_per_node and processes > site.gpus_per_node:
        raise ConfigError(
            f"--processes {processes}: the nodes of this site have {site.gpus_per_node} GPUs (gpus_per_node); lower it"
        )
    return Shape(nodes, processes or site.gpus_per_node or 1)


def check_name(option: str, name: str) -> None:
    """Refuses what would be no folder of its own, or not where its siblings are; raises ConfigError."""
    if re.fullmatch(r"[\w.-]+", name) is None or name.strip(".") == "":
        raise ConfigError(f"{option} {name!r}: the name of a folder, of letters, digits, dots, - and _")


def check_layout(config: RunConfig, shape: Shape) -> None:
    """Refuses here what the job would refuse in its first seconds; raises ConfigError."""
    from cola_megatron.training.batches import micro_batches_per_step

    parallel = config.parallel
    replica = parallel.ranks_of_a_replica
    context = f" times context_parallel_size={parallel.context_parallel_size}"
    context = context if parallel.context_parallel_size > 1 else ""
    if shape.world_size % replica:
        raise ConfigError(
            f"{shape.nodes} nodes of {shape.processes} processes: {shape.world_size} is not divisible by "
            f"tensor_parallel_size={parallel.tensor_parallel_size} times "
            f"pipeline_parallel_size={parallel.pipeline_parallel_size}{context}; change --nodes or the layout"
        )
    micro_batches_per_step(config, shape.world_size // replica)


def write_training(config: RunConfig, site: Site, shape: Shape) -> Submission:
    """Writes the next submission folder of a run: script, supervisor, config, site, git state and environment.

    Raises:
        ConfigError: the layout does not fit the processes.
    """
    check_layout(config, shape)
    working = Path.cwd()
    run_folder = working / config.run_folder
    folder = next_folder(run_folder)
    write(folder / "config.yaml", dump_config(config))
    write(folder / "site.yaml", dump_config(site))
    write(folder / SCRIPT, training_script(site, shape, config.name, folder, working))
    write(folder / "supervise.py", (resources.files("slurm") / "supervise.py").read_text(encoding="utf-8"))
    write_surroundings(folder)
    return Submission(folder, run_folder, site.signal_seconds)


def next_folder(run_folder: Path) -> Path:
    """A new folder for a submission, numbered on from those before."""
    parent = run_folder / SUBMISSIONS
    parent.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(path.name) for path in parent.iterdir() if path.name.isdecimal()), default=0)
    while True:
        folder = parent / f"{number:04d}"
        try:
            folder.mkdir()
        except FileExistsError:  # somebody submits the same run at the same moment
            number += 1
        else:
            return folder


def write(path: Path, text: str, mode: int = 0o666) -> None:
    """Writes a file that a power cut leaves whole; raises OSError that names it."""
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # that of a full disk names no file
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_surroundings(folder: Path) -> None:
    """git.txt and git.diff of the code, environment.txt with packages and variables, for nobody else to read."""
    write(folder / "git.txt", "".join(f"{line}\n" for line in (git("rev-parse", "HEAD"), git("status", "-s"))))
    write(folder / "git.diff", f"{git('diff', 'HEAD') or ''}\n")
    packages = sorted({f"{each.metadata['Name']}=={each.version}" for each in metadata.distributions()})
    variables = [
        f"{name}={value if _may_be_shown(name, value) else '(left out)'}" for name, value in sorted(os.environ.items())
    ]
    text = [f"python {sys.version}", f"executable {sys.executable}", "", *packages, "", *variables]
    write(folder / "environment.txt", "\n".join(text) + "\n", 0o600)


def _may_be_shown(name: str, value: str) -> bool:
    return bool(SHOWN.match(name)) and not SECRET.search(name.upper()) and not SECRET_VALUE.search(value)
