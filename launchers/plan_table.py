"""How `cola plan` shows its layouts: a ranked table, the best one in detail, or all of it as a tree."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cola_megatron.config import RunConfig
from cola_megatron.families import family_of
from cola_megatron.planning.compute import Cost, compute_of
from cola_megatron.planning.flops import training_flops_per_sample
from cola_megatron.planning.hardware import GIB
from cola_megatron.planning.plan import Cluster, Layout, batch_limit
from launchers.output import print_table


def print_plan(
    config: RunConfig, cluster: Cluster, run: Cost, layouts: Sequence[Layout], refused: int, top: int
) -> None:
    """The table and the best layout, on stdout."""
    family = family_of(config)
    parameters = sum(part.parameters for part in family.parts(config))
    print(
        f"{config.name}, {family.describe(config)}: {parameters:,} parameters, {config.training.precision}, "
        f"global batch {config.training.global_batch_size:,} x {config.data.sequence_length:,} tokens, on "
        f"{cluster.gpus:,} {cluster.gpu.name} of {cluster.gpu_memory / GIB:.0f} GiB"
    )
    print_table(_length_rows(run), "Length of the run")
    print(
        "\nLayouts that fit, by estimated time (memory: GiB at the peak of the fullest rank; sent: GiB a rank and step)"
    )
    _print_grid([_row(layout, run) for layout in layouts[:top]])
    rest = [f"{len(layouts) - top} slower ones are not shown (--top)"] if len(layouts) > top else []
    if refused:
        rest.append(f"{refused} combinations need more than {cluster.usable_memory / GIB:.1f} GiB")
    if rest:
        print(f"  {'; '.join(rest)}")
    if note := family.note_on_length(config):
        print(f"  {note}")
    limit = batch_limit(config, cluster)
    if limit is not None:
        print(f"  {limit}")
    _print_details(layouts[0], run)


def as_tree(config: RunConfig, cluster: Cluster, run: Cost, layouts: Sequence[Layout], refused: int) -> dict[str, Any]:
    """Everything that is known, in bytes, seconds and FLOPs."""
    return {
        "config": config.name,
        "parameters": sum(part.parameters for part in family_of(config).parts(config)),
        "cluster": asdict(cluster) | {"usable_memory": cluster.usable_memory},
        "run": asdict(run),
        "parts": [asdict(part) | {"flops_per_sample": part.flops} for part in family_of(config).parts(config)],
        "refused_for_memory": refused,
        "batch_limit": batch_limit(config, cluster),
        "layouts": [_layout_tree(layout, run) for layout in layouts],
    }


def _layout_tree(layout: Layout, run: Cost) -> dict[str, Any]:
    parallel, training = layout.config.parallel, layout.config.training
    times = [time for time, _ in layout.times]
    return {
        "overrides": layout.overrides,
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "context_parallel_size": parallel.context_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "data_parallel_size": layout.replicas,
        "zero_stage": parallel.zero_stage,
        "offload_optimizer": parallel.offload_optimizer,
        "micro_batch_size": training.micro_batch_size,
        "micro_batches": layout.micro_batches,
        "activation_checkpointing": training.activation_checkpointing,
        "pipeline_split": list(layout.split),
        "stages": [
            {"holds": holds, **asdict(memory)} for holds, memory in zip(layout.stage_labels, layout.memory, strict=True)
        ],
        "peak_bytes": layout.peak,
        "step_seconds": layout.step_seconds,
        "step_flops": layout.step_flops,
        "hardware_flops": _hardware_flops(layout, run),
        "time": asdict(times[0]),
        "time_of_a_frozen_step": asdict(times[1]) if len(times) > 1 else None,
        "tokens_per_second": layout.tokens_per_second,
        "mfu": layout.mfu,
        "days": _days(layout, run),
        "gpu_hours": _gpu_hours(layout, run),
    }


def _length_rows(run: Cost) -> list[tuple[str, str]]:
    rows = [
        ("steps, tokens", f"{run.steps:,}, {run.tokens:,}"),
        ("model EFLOPs", f"{run.compute['model'] / 1e18:,.4g}"),
        *((f"  {name}", f"{flops / 1e18:,.4g}") for name, flops in run.parts.items()),
    ]
    if nominal := run.compute["nominal"]:
        rows.append(("nominal EFLOPs", f"{nominal / 1e18:,.4g} (6 N D, the axis of the paper's figures)"))
    return rows


def _row(layout: Layout, run: Cost) -> dict[str, str]:
    parallel, training = layout.config.parallel, layout.config.training
    return {
        "TP": str(parallel.tensor_parallel_size),
        "SP": "yes" if parallel.sequence_parallel else "",
        "CP": str(parallel.context_parallel_size) if parallel.context_parallel_size > 1 else "",
        "PP": str(parallel.pipeline_parallel_size),
        "DP": str(layout.replicas),
        "ZeRO": f"{parallel.zero_stage}{' host' if parallel.offload_optimizer else ''}",
        "batch": str(training.micro_batch_size),
        "recompute": "yes" if training.activation_checkpointing else "",
        "memory": f"{layout.peak / GIB:.1f}",
        "step s": f"{layout.step_seconds:.3g}",
        "tokens/s": f"{layout.tokens_per_second:,.0f}",
        "MFU": f"{layout.mfu:.1%}",
        "sent": f"{layout.times[0][0].sent / GIB:.3g}",
        "days": f"{_days(layout, run):,.3g}",
        "GPU-hours": _rounded(_gpu_hours(layout, run)),
    }


def _print_details(layout: Layout, run: Cost) -> None:
    print("\nThe first in detail")
    first, _ = layout.times[0]
    seconds = {
        "computation": first.computation,
        "tensor-parallel traffic": first.tensor,
        "context-parallel traffic": first.context,
        "pipeline traffic": first.pipeline,
        "pipeline bubble": first.bubble,
        "data-parallel traffic": first.data,
        "optimiser": first.optimizer,
    }
    sent = {
        "tensor": first.sent_tensor,
        "context": first.sent_context,
        "pipeline": first.sent_pipeline,
        "data": first.sent_data,
    }
    print_table(
        [
            ("overrides", " ".join(layout.overrides)),
            ("FLOPs of a sample", f"{training_flops_per_sample(layout.config):.4g}"),
            ("hardware EFLOPs", f"{_hardware_flops(layout, run) / 1e18:,.4g} (with what is computed again or dropped)"),
            ("micro-batches", f"{layout.micro_batches} of {layout.config.training.micro_batch_size}"),
            ("seconds of a step", ", ".join(f"{name} {value:.3g}" for name, value in seconds.items() if value)),
            ("GiB a rank sends", ", ".join(f"{name} {size / GIB:.3g}" for name, size in sent.items() if size) or "0"),
        ]
    )
    print("\nMemory of one rank in GiB; activations now (kept, recomputed): with this, without, and with recomputation")
    _print_grid([_stage_row(layout, stage) for stage in range(len(layout.split))])
    for stage, holds in enumerate(layout.stage_labels):
        print(f"  stage {stage} holds {layout.split[stage]} steps: {holds}")


def _stage_row(layout: Layout, stage: int) -> dict[str, str]:
    memory = layout.memory[stage]
    states = memory.states
    sizes = {
        "weights": states.weights,
        "gradients": states.gradients + states.parameter_gradients,
        "optimiser": states.optimizer,
        "buffers": states.buffers,
        "activations": memory.activations,
        "(kept)": memory.activations_kept,
        "(recomputed)": memory.activations_recomputed,
        "peak": memory.peak,
        "host": states.host,
    }
    return {"stage": str(stage), **{name: f"{size / GIB:.2f}" for name, size in sizes.items()}}


def _hardware_flops(layout: Layout, run: Cost) -> float:
    """Of the whole run; it depends on whether the layout recomputes."""
    return compute_of(layout.config, run.steps)["hardware"]


def _days(layout: Layout, run: Cost) -> float:
    return run.steps * layout.step_seconds / 86_400


def _rounded(hours: float) -> str:
    """Whole hours where there are many, else what there is of one."""
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"


def _gpu_hours(layout: Layout, run: Cost) -> float:
    return run.steps * layout.step_seconds / 3_600 * layout.cluster.gpus


def _print_grid(rows: Sequence[dict[str, str]]) -> None:
    """Columns under their names, right-aligned; an empty column is left out."""
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    for row in [dict(zip(names, names, strict=True)), *rows]:
        print("  " + "  ".join(row[name].rjust(widths[name]) for name in names).rstrip())
