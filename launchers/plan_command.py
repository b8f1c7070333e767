"""`cola plan`: layouts of a run on a number of GPUs, ranked by their estimated time."""

import typer

from launchers.output import print_json


def plan(
    source: str = typer.Argument(..., help="A preset (tiny, small, base, paper-2b) or a YAML file."),
    overrides: list[str] = typer.Argument(
        None, help="section.key=value; a layout key given here (parallel.tensor_parallel_size=2) is kept."
    ),
    gpus: int = typer.Option(..., min=1, help="GPUs of the job."),
    gpu: str = typer.Option("h100", help="A GPU of the table in docs/planning.md: a100, h100, h200, b200, ..."),
    gpu_memory: float = typer.Option(None, min=1, help="GiB of one GPU, where it is not the data sheet's."),
    gpus_per_node: int = typer.Option(8, min=1, help="GPUs that share NVLink."),
    tokens: float = typer.Option(None, min=1, help="Length of the run in tokens, instead of training.steps."),
    eflops: float = typer.Option(None, help="Length of the run in model EFLOPs (1e18 FLOPs as this project counts)."),
    nominal_eflops: float = typer.Option(None, help="Length of the run on the paper's axis, 6 N D in 1e18 FLOPs."),
    top: int = typer.Option(10, min=1, help="Rows of the table."),
    mfu: float = typer.Option(None, help="Measured share of the peak for all computation, instead of the model's."),
    assume: list[str] = typer.Option(None, help="Another efficiency, as link=0.6; `--json` lists them."),
    as_json: bool = typer.Option(False, "--json", help="Everything as JSON."),
) -> None:
    """Estimate memory, communication and time of every layout, and print those that fit, the fastest first.

    Nothing is built and no GPU is needed. How the estimate is made: docs/planning.md.

    Examples: `cola plan paper-2b --gpus 64` and
    `cola plan paper-2b training.global_batch_size=2048 --gpus 128 --gpu h200 --eflops 2000`
    """
    from cola_megatron.config import ConfigError, load_config
    from cola_megatron.planning.compute import cost_of, steps_for
    from cola_megatron.planning.hardware import GIB, GPUS, efficiency_with
    from cola_megatron.planning.plan import CHOICES, Cluster
    from cola_megatron.planning.plan import plan as rank
    from launchers.plan_table import as_tree, print_plan

    config = load_config(source, overrides or [])
    if gpu not in GPUS:
        raise ConfigError(f"--gpu {gpu}: not in the table of {', '.join(GPUS)}; docs/planning.md says how to add one")
    lengths = {"--tokens": tokens, "--eflops": eflops, "--nominal-eflops": nominal_eflops}
    given = [name for name, value in lengths.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} are two lengths of one run; give one of them")
    for name in ("--eflops", "--nominal-eflops"):
        value = lengths[name]
        if value is not None and not 0 < value < 1e9:
            raise ConfigError(f"{name} {value}: must be above 0 and below 1e9")
    steps = config.training.steps
    if tokens is not None:
        steps = steps_for(config, "tokens", tokens)
    elif eflops is not None:
        steps = steps_for(config, "model", eflops * 1e18)
    elif nominal_eflops is not None:
        steps = steps_for(config, "nominal", nominal_eflops * 1e18)
    efficiency = efficiency_with([*(assume or []), *([] if mfu is None else [f"mfu={mfu}"])])
    memory = GPUS[gpu].memory_bytes if gpu_memory is None else gpu_memory * GIB
    cluster = Cluster(gpus, GPUS[gpu], memory, gpus_per_node, efficiency)
    held = [key for key in (override.partition("=")[0] for override in overrides or []) if key in CHOICES]
    layouts, refused = rank(config, cluster, held)
    run = cost_of(config, steps)
    if as_json:
        print_json(as_tree(config, cluster, run, layouts[:top], refused))
    else:
        print_plan(config, cluster, run, layouts, refused, top)
