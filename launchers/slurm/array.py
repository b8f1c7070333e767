"""Many runs as one job array, each with a submission folder of its own."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cola_megatron.config import ConfigError, RunConfig, load_config
from launchers.slurm import commands
from launchers.slurm.queue import read_queue
from launchers.slurm.render import Shape, training_script
from launchers.slurm.runs import has_finished
from launchers.slurm.site import Site, load_site
from launchers.slurm.submission import (
    ELEMENTS,
    JOB,
    SCRIPT,
    SUBMISSIONS,
    check_layout,
    check_name,
    next_folder,
    write,
    write_surroundings,
    write_training,
)

__all__ = ["ArraySubmission", "configs_of", "dry_script", "lines_of", "write_again", "write_array"]

ARRAY = "array.json"


@dataclass(frozen=True)
class ArraySubmission:
    """A written batch script of an array."""

    folder: Path
    run_folders: tuple[Path, ...]
    """Of the elements, in order."""
    element_folders: tuple[Path, ...]
    """Their submission folders."""
    signal_seconds: int
    """Of the site: what the time limit has to exceed."""

    @property
    def parent(self) -> Path:
        """The folder that all runs of the array lie in."""
        return self.folder.parent.parent

    def validate(self) -> str:
        """What `sbatch --test-only` says; raises SlurmError."""
        return commands.test_only(str(self.folder / SCRIPT))

    def submit(self, after: Sequence[str] = (), after_any: Sequence[str] = ()) -> str:
        """Hands the array to Slurm and notes the ids of its elements in their folders; raises SlurmError.

        Args:
            after: jobs that must have ended well before.
            after_any: jobs that must have ended before, well or not.
        """
        job = commands.submit(self.folder / SCRIPT, self.folder / JOB, after, self.signal_seconds, after_any)
        try:
            for number, folder in enumerate(self.element_folders):
                (folder / JOB).write_text(f"{job}_{number}\n")
        except OSError:
            commands.cancel([job])
            raise
        return job


def lines_of(path: Path) -> list[str]:
    """The runs of a file: its lines, without comments and empty ones. Raises ConfigError."""
    try:
        lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give a file with one run a line") from None
    return [line for line in lines if line]


def configs_of(name: str, source: str, overrides: list[str], lines: list[str]) -> list[RunConfig]:
    """The configs of an array's runs, which lie in RUNS_FOLDER/name/.

    Args:
        lines: of each run its name, then, where it is not `source`, its config, and its own overrides.

    Raises:
        ConfigError: no runs, two of one name, or a config that cannot run; the message names the run.
    """
    check_name("--name", name)
    configs = []
    for line in lines:
        try:
            run, *words = shlex.split(line) or [""]
        except ValueError as error:  # a quote without its other
            raise ConfigError(f"--run {line!r}: {error}; write it as 'NAME key=value ...'") from None
        check_name("--run", run)
        named = [word for word in words if "=" not in word]
        if len(named) > 1:
            raise ConfigError(f"run {run}: {' and '.join(named)} are two configs; overrides have the form key=value")
        try:
            given = [*overrides, *(word for word in words if "=" in word)]
            config = load_config(named[0] if named else source, given)
            given += [f"runs_folder={config.runs_folder / name}", f"name={run}"]
            if config.training.log.wandb_group is None:
                given.append(f"training.log.wandb_group={name}")
            configs.append(load_config(named[0] if named else source, given))
        except ConfigError as error:
            raise ConfigError(f"run {run}: {error}") from None
    names = [config.name for config in configs]
    twice = sorted({run for run in names if names.count(run) > 1})
    if twice:
        raise ConfigError(f"{', '.join(twice)}: two runs of an array need two names")
    if not configs:
        raise ConfigError("an array needs runs: give --run 'NAME key=value' or --runs FILE")
    return configs


def write_array(
    name: str, configs: list[RunConfig], site: Site, shape: Shape, concurrency: int | None
) -> ArraySubmission:
    """Writes the submission folders of the runs, and one of the array; raises ConfigError."""
    for config in configs:
        try:
            check_layout(config, shape)
        except ConfigError as error:
            raise ConfigError(f"run {config.name}: {error}") from None
    working = Path.cwd()
    folder = next_folder(working / configs[0].runs_folder)
    submissions = [write_training(config, site, shape) for config in configs]
    (folder / ELEMENTS).mkdir()
    for number, submission in enumerate(submissions):
        (folder / ELEMENTS / str(number)).symlink_to(submission.folder)
    script = training_script(site, shape, name, folder, working, _elements(len(configs), concurrency))
    write(folder / SCRIPT, script)
    described = {
        "name": name,
        "shape": asdict(shape),
        "concurrency": concurrency,
        "runs": [str(submission.run_folder) for submission in submissions],
    }
    write(folder / ARRAY, json.dumps(described, indent=1) + "\n")
    write_surroundings(folder)
    return ArraySubmission(
        folder,
        tuple(submission.run_folder for submission in submissions),
        tuple(submission.folder for submission in submissions),
        site.signal_seconds,
    )


def write_again(parent: Path, only: list[str], concurrency: int | None) -> ArraySubmission:
    """A new submission of those runs of an array that have neither finished nor wait or train now.

    Args:
        only: names of runs; empty: all that are left.

    Raises:
        ConfigError: no array there, no such run, or nothing is left to do.
        SlurmError: it is not known what waits or trains now.
    """
    arrays = sorted((parent / SUBMISSIONS).glob(f"*/{ARRAY}"))
    if not arrays:
        raise ConfigError(f"{parent}: no array was submitted from there; give the folder that its runs lie in")
    described = [json.loads(path.read_text()) for path in arrays]
    known = {Path(run).name: Path(run) for each in described for run in each["runs"]}
    unknown = sorted(set(only) - known.keys())
    if unknown:
        raise ConfigError(f"{', '.join(unknown)}: no such run in {parent}; it has {', '.join(known)}")
    queue = read_queue()
    left = {}
    for name, run_folder in known.items():
        if (not only or name in only) and not has_finished(run_folder) and not queue.of_run(run_folder):
            left[name] = sorted(run_folder.glob(f"{SUBMISSIONS}/*/config.yaml"))[-1].parent
    if not left:
        raise ConfigError(f"{parent}: every run {'named ' if only else ''}has finished, or is in the queue")
    configs = [load_config(folder / "config.yaml") for folder in left.values()]
    last = described[-1]
    site = load_site(str(next(iter(left.values())) / "site.yaml"))
    return write_array(last["name"], configs, site, Shape(**last["shape"]), concurrency or last["concurrency"])


def dry_script(name: str, configs: list[RunConfig], site: Site, shape: Shape, concurrency: int | None) -> str:
    """The batch script that `write_array` would write; raises ConfigError."""
    for config in configs:
        check_layout(config, shape)
    folder = Path.cwd() / configs[0].runs_folder / SUBMISSIONS / "NNNN"
    return training_script(site, shape, name, folder, Path.cwd(), _elements(len(configs), concurrency))


def _elements(count: int, concurrency: int | None) -> str:
    return f"0-{count - 1}" + (f"%{concurrency}" if concurrency else "")
