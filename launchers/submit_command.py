"""`cola submit`: training as jobs of Slurm."""

from pathlib import Path

import typer
from typer.core import TyperGroup

from launchers.output import print_json, print_table


class ConfigByDefault(TyperGroup):
    """`submit CONFIG` is `submit run CONFIG`, where CONFIG is not the name of another command."""

    def parse_args(self, ctx, args):
        """Puts the name of the command there where it was left out."""
        first = next((word for word in args if not word.startswith("-")), None)
        if first is not None and first not in self.commands and "--help" not in args[: args.index(first)]:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=ConfigByDefault,
    help="Hand training to Slurm: `cola submit CONFIG --nodes N`, or a pipeline, or an array.",
    epilog="Example: cola submit paper-2b --nodes 8 name=vae stage=1 data.path=data/my_corpus",
    no_args_is_help=True,
)

SITE = typer.Option(None, help="Site file, or plain, cloud-efa, container; by default $COLA_SITE.")
SETTINGS = typer.Option([], "--set", help="A key of the site file, KEY=VALUE; repeatable.")
NODES = typer.Option(1, min=1, help="Nodes of a training job.")
PROCESSES = typer.Option(None, min=1, help="Processes on each node; by default one for each GPU, or one.")
PARTITION = typer.Option(None, help="Partition, over the site's.")
ACCOUNT = typer.Option(None, help="Account, over the site's.")
TIME = typer.Option(None, help="Time limit, over the site's.")
DRY_RUN = typer.Option(False, "--dry-run", help="Print the batch script; write and submit nothing.")
JSON = typer.Option(False, "--json", help="Print what was submitted as JSON.")


@app.command("run")
def run(
    source: str = typer.Argument(..., metavar="CONFIG", help="A preset (tiny, small, base, paper-2b) or a YAML file."),
    overrides: list[str] = typer.Argument(None, help="section.key=value, as many as you like."),
    nodes: int = NODES,
    processes: int = PROCESSES,
    site: str = SITE,
    settings: list[str] = SETTINGS,
    partition: str = PARTITION,
    account: str = ACCOUNT,
    time: str = TIME,
    after: list[str] = typer.Option([], help="Job ids that must end well before; repeatable."),
    dry_run: bool = DRY_RUN,
    test_only: bool = typer.Option(False, "--test-only", help="Write the folder and ask Slurm, but do not submit."),
    as_json: bool = JSON,
) -> None:
    """Train a config on nodes of a cluster; survives time limits, pre-emption and lost nodes.

    Script, config, site file, git state with its diff and the environment are kept in RUN/submissions/NNNN.

    Example: `cola submit base name=first stage=1 data.path=/data/web --nodes 4 --site our-cluster.yaml`
    """
    from cola_megatron.config import load_config
    from launchers.slurm import commands
    from launchers.slurm.queue import refuse_second
    from launchers.slurm.render import training_script
    from launchers.slurm.submission import check_layout, shape_of, write_training

    config, chosen = load_config(source, overrides or []), chosen_site(site, settings, partition, account, time)
    shape = shape_of(chosen, nodes, processes)
    if dry_run:
        check_layout(config, shape)
        folder = Path.cwd() / config.run_folder / "submissions" / "NNNN"
        print(training_script(chosen, shape, config.name, folder, Path.cwd()), end="")
        return
    if not test_only:
        refuse_second(config.run_folder)
        commands.check_after(after)
    submission = write_training(config, chosen, shape)
    starts = submission.validate()
    job = None if test_only else submission.submit(after)
    if as_json:
        print_json({"job": job, "folder": submission.folder, "run_folder": submission.run_folder, "slurm": starts})
        return
    rows = [
        ("job", job or "not submitted (--test-only)"),
        ("folder", str(submission.folder)),
        ("Slurm says", starts),
        ("follow", f"tail -F {submission.folder}/slurm-{job or 'JOB'}.log"),
        ("state", f"cola status {config.run_folder}"),
        ("end it", f"cola cancel {config.run_folder}"),
    ]
    print_table(rows)


@app.command("array")
def array(
    source: str = typer.Argument(None, metavar="CONFIG", help="A preset or a YAML file, for runs that name no other."),
    overrides: list[str] = typer.Argument(None, help="section.key=value for all runs."),
    name: str = typer.Option(None, help="Name of the array: its runs lie in RUNS_FOLDER/NAME."),
    run: list[str] = typer.Option([], help="One run: 'NAME [CONFIG] key=value ...'; repeatable."),
    runs: Path = typer.Option(None, help="A file with one such line for each run; # begins a comment."),
    concurrency: int = typer.Option(None, min=1, help="Runs that train at once."),
    again: Path = typer.Option(None, help="Folder of an array: submit those of its runs that have not finished."),
    only: list[str] = typer.Option([], help="With --again: only this run; repeatable."),
    nodes: int = NODES,
    processes: int = PROCESSES,
    site: str = SITE,
    settings: list[str] = SETTINGS,
    partition: str = PARTITION,
    account: str = ACCOUNT,
    time: str = TIME,
    after: list[str] = typer.Option([], help="Job ids that must end well before; repeatable."),
    dry_run: bool = DRY_RUN,
    as_json: bool = JSON,
) -> None:
    """Train many configs as one job array; each run survives and fails by itself.

    Example: `cola submit array base data.path=/data/web --name rates --concurrency 2 --nodes 4
    --run "low training.optimizer.learning_rate=1e-4" --run "high training.optimizer.learning_rate=3e-4"`

    Example: `cola submit array --again runs/rates --only high`
    """
    from cola_megatron.config import ConfigError
    from launchers.slurm import array as arrays
    from launchers.slurm import commands
    from launchers.slurm.queue import refuse_second
    from launchers.slurm.submission import shape_of

    if not dry_run:
        commands.check_after(after)
    if again is not None:
        submission = arrays.write_again(again, only, concurrency)
    elif source is None or name is None:
        raise ConfigError("give CONFIG and --name, or --again FOLDER")
    else:
        lines = [*run, *(arrays.lines_of(runs) if runs is not None else [])]
        configs = arrays.configs_of(name, source, overrides or [], lines)
        chosen = chosen_site(site, settings, partition, account, time)
        shape = shape_of(chosen, nodes, processes)
        if dry_run:
            print(arrays.dry_script(name, configs, chosen, shape, concurrency), end="")
            return
        refuse_second(*(config.run_folder for config in configs))
        commands.check_array_size(len(configs))
        submission = arrays.write_array(name, configs, chosen, shape, concurrency)
    starts = submission.validate()
    job = submission.submit(after)
    if as_json:
        elements = [
            {"job": f"{job}_{number}", "run_folder": path} for number, path in enumerate(submission.run_folders)
        ]
        print_json({"job": job, "folder": submission.folder, "elements": elements, "slurm": starts})
        return
    for number, path in enumerate(submission.run_folders):
        print(f"  {job}_{number}  {path}")
    print_table([("job", job), ("folder", str(submission.folder)), ("state", f"cola status {submission.parent}")])


@app.command("pipeline")
def pipeline(
    source: str = typer.Argument(..., metavar="CONFIG", help="A preset or a YAML file, for both stages."),
    overrides: list[str] = typer.Argument(None, help="section.key=value for both stages."),
    name: str = typer.Option(..., help="Everything lies in RUNS_FOLDER/NAME."),
    recipe: Path = typer.Option(None, help="Recipe of the data set, or `embedded`; without it, give data.path."),
    stage_one: list[str] = typer.Option([], help="section.key=value of stage 1; repeatable."),
    stage_two: list[str] = typer.Option([], help="section.key=value of stage 2; repeatable."),
    benchmarks: Path = typer.Option(None, help="Folder of the tasks' items; without it nothing is evaluated."),
    tasks: str = typer.Option("all", help="Task names, separated by commas."),
    limit: int = typer.Option(None, min=1, help="Only the first items of every task."),
    nodes: int = NODES,
    processes: int = PROCESSES,
    site: str = SITE,
    settings: list[str] = SETTINGS,
    partition: str = PARTITION,
    account: str = ACCOUNT,
    time: str = TIME,
    dry_run: bool = DRY_RUN,
    as_json: bool = JSON,
) -> None:
    """Prepare, stage 1, stage 2, export, evaluate, report: one chain of jobs. Given again, it goes on.

    Example: `cola submit pipeline base --name first --recipe web.yaml --benchmarks /data/benchmarks --nodes 8`
    """
    from launchers.prep_recipes import from_file
    from launchers.slurm.pipeline import plan_pipeline
    from launchers.slurm.submission import shape_of

    chosen = chosen_site(site, settings, partition, account, time)
    planned = plan_pipeline(
        source,
        overrides or [],
        name,
        (stage_one, stage_two),
        None if recipe is None else from_file(recipe, [], None),
        chosen,
        shape_of(chosen, nodes, processes),
        None if benchmarks is None else benchmarks.absolute(),
        tasks,
        limit,
    )
    if dry_run:
        print(planned.dry_run(), end="")
        return
    parts = planned.submit()
    if as_json:
        print_json({part.name: {"job": part.job, "log": part.log} for part in parts})
        return
    print_table([(part.name, f"job {part.job}, {part.log}" if part.job else "finished before") for part in parts])
    print_table([("state", f"cola status {planned.folder}"), ("end it", f"cola cancel {planned.folder}")])


@app.command("site")
def site(
    name: str = typer.Argument("plain", help="plain, cloud-efa or container."),
) -> None:
    """Print an example of a site file, to put your own names in.

    Example: `cola submit site plain > our.yaml`
    """
    from launchers.slurm.site import example

    print(example(name), end="")


def chosen_site(site: str | None, settings: list[str], partition: str | None, account: str | None, time: str | None):
    """The site with what the command line has over it; raises ConfigError."""
    from launchers.slurm.site import check_time_limit, load_site

    given = {"partition": partition, "account": account, "time": time}
    chosen = load_site(site, [*settings, *(f"{key}={value}" for key, value in given.items() if value is not None)])
    check_time_limit(chosen)
    return chosen
