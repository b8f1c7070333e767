"""Layouts of a config on a number of GPUs: which are possible, which fit into memory, how fast each is estimated to be.

A layout is the config itself with other values under `parallel` and a few under `training`, and its number of
replicas. What is possible is what the config's own checks accept.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from cola_megatron.config import ConfigError, RunConfig, resolve_config
from cola_megatron.errors import UserError
from cola_megatron.families import Mode, family_of
from cola_megatron.planning.flops import training_flops_by_step
from cola_megatron.planning.hardware import GIB, GPU, Efficiency
from cola_megatron.planning.memory import RankMemory, micro_batches, rank_memory
from cola_megatron.planning.split import pipeline_split
from cola_megatron.planning.step_time import StepTime, step_time

LARGEST_TENSOR_PARALLEL = 8
LARGEST_MICRO_BATCH = 64

# What a layout may choose, in the order of the overrides that are printed.
TENSOR, SEQUENCE, CONTEXT, PIPELINE, SPLIT, ZERO, OFFLOAD, MICRO_BATCH, RECOMPUTE = CHOICES = (
    "parallel.tensor_parallel_size",
    "parallel.sequence_parallel",
    "parallel.context_parallel_size",
    "parallel.pipeline_parallel_size",
    "parallel.pipeline_split",
    "parallel.zero_stage",
    "parallel.offload_optimizer",
    "training.micro_batch_size",
    "training.activation_checkpointing",
)


class PlanError(UserError):
    """No layout can be recommended; the message is one line that says what would help."""


@dataclass(frozen=True)
class Cluster:
    """What the layouts are for."""

    gpus: int
    gpu: GPU
    gpu_memory: float
    """Bytes that one GPU has."""
    gpus_per_node: int = 8
    efficiency: Efficiency = field(default_factory=Efficiency)

    @property
    def usable_memory(self) -> float:
        """Bytes that the tensors of one rank may fill."""
        return self.gpu_memory * self.efficiency.usable_memory


@dataclass(frozen=True)
class Layout:
    """One layout of a config on a cluster, with its estimates."""

    config: RunConfig
    replicas: int
    split: tuple[int, ...]
    """Steps with parameters in each pipeline stage."""
    cluster: Cluster

    @cached_property
    def memory(self) -> tuple[RankMemory, ...]:
        """A rank of each pipeline stage."""
        return rank_memory(self.config, self.replicas, self.split)

    @property
    def peak(self) -> float:
        """Bytes at the worst moment of the fullest rank."""
        return max(stage.peak for stage in self.memory)

    @property
    def fits(self) -> bool:
        """Whether every rank's peak stays within the usable memory."""
        return self.peak <= self.cluster.usable_memory

    @cached_property
    def times(self) -> list[tuple[StepTime, int]]:
        """Of each kind of step, and how many of a period are of it."""
        family = family_of(self.config)
        return [(self._step_time(mode), count) for mode, count in family.kinds(self.config, family.period(self.config))]

    @property
    def step_seconds(self) -> float:
        """Mean over the config's kinds of steps."""
        return sum(count * time.seconds for time, count in self.times) / sum(count for _, count in self.times)

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together."""
        return self.config.training.global_batch_size * self.config.data.sequence_length / self.step_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the GPUs could do in the time of a step."""
        peak = self.cluster.gpu.bf16_flops if self.config.training.precision == "bf16" else self.cluster.gpu.fp32_flops
        return self.step_flops / (self.step_seconds * self.cluster.gpus * peak)

    @property
    def step_flops(self) -> float:
        """Model FLOPs of one optimiser step, the mean over the config's kinds of steps."""
        period = family_of(self.config).period(self.config)
        return training_flops_by_step(self.config)(period) / period

    @property
    def micro_batches(self) -> int:
        """Of one replica in an optimiser step."""
        return micro_batches(self.config, self.replicas)

    @property
    def stage_labels(self) -> list[str]:
        """What each pipeline stage holds, as in `vae.encoder.embed, 4 vae.encoder.block, ...`."""
        labels, held = iter(part.label for part in family_of(self.config).parts(self.config)), []
        for count in self.split:
            runs = [(label, len(list(run))) for label, run in itertools.groupby(itertools.islice(labels, count))]
            held.append(", ".join(label if times == 1 else f"{times} {label}" for label, times in runs))
        return held

    @property
    def choices(self) -> dict[str, Any]:
        """The keys that make this layout out of any config of the model, and their values."""
        values = choices_of(self.config)
        values[SPLIT] = list(self.split) if len(self.split) > 1 else None
        values[CONTEXT] = values[CONTEXT] if values[CONTEXT] > 1 else None  # which is the default everywhere
        return {key: value for key, value in values.items() if value is not None}

    @property
    def overrides(self) -> list[str]:
        """The same as words of a command: YAML's spelling, without spaces, so that a shell takes each as one."""
        return [f"{key}={str(value).lower().replace(' ', '')}" for key, value in self.choices.items()]

    def _step_time(self, mode: Mode) -> StepTime:
        cluster = self.cluster
        return step_time(
            self.config, self.replicas, self.split, cluster.gpu, cluster.efficiency, cluster.gpus_per_node, mode
        )


def plan(config: RunConfig, cluster: Cluster, held: Iterable[str] = ()) -> tuple[list[Layout], int]:
    """Layouts that fit, the fastest first, and how many were refused for their memory.

    Of the layouts that share tensor, sequence and pipeline parallelism and the ZeRO stage, the fastest stands for all.

    Args:
        held: keys of `CHOICES` whose value in the config is kept.

    Raises:
        ConfigError: the numbers do not divide.
        PlanError: none fits.
    """
    layouts = list(layouts_of(config, cluster, set(held)))
    fitting = [layout for layout in layouts if layout.fits]
    if not fitting:
        least = min(layouts, key=lambda layout: layout.peak)
        raise PlanError(
            f"{config.name}: none of {len(layouts)} layouts on {cluster.gpus} GPUs fits into "
            f"{cluster.usable_memory / GIB:.1f} GiB (of {cluster.gpu_memory / GIB:.1f} GiB); the least needs "
            f"{least.peak / GIB:.1f} GiB ({' '.join(least.overrides)}); use more or larger GPUs, or a smaller model"
        )
    best: dict[tuple, Layout] = {}
    for layout in sorted(fitting, key=_rank):
        best.setdefault(tuple(_get(layout.config, key) for key in (TENSOR, SEQUENCE, PIPELINE, ZERO)), layout)
    return list(best.values()), len(layouts) - len(fitting)


def choices_of(config: RunConfig) -> dict[str, Any]:
    """What a config says of its layout, by key."""
    return {key: _get(config, key) for key in CHOICES}


def layout_of(config: RunConfig, cluster: Cluster) -> Layout:
    """The layout that a config has on a cluster, whether it fits or not.

    Raises:
        ConfigError: the numbers do not divide.
    """
    replica = config.parallel.ranks_of_a_replica
    replicas = cluster.gpus // replica
    if cluster.gpus % replica:
        shared = {key: _get(config, key) for key in (TENSOR, CONTEXT, PIPELINE)}
        sizes = " times ".join(f"{key}={size}" for key, size in shared.items() if size > 1)
        raise ConfigError(f"{cluster.gpus} GPUs are not divisible by {sizes}")
    if config.training.global_batch_size % replicas:
        raise _indivisible(config, replicas, cluster)
    if config.training.global_batch_size // replicas % config.training.micro_batch_size:
        raise ConfigError(
            f"{MICRO_BATCH}={config.training.micro_batch_size} does not divide the "
            f"{config.training.global_batch_size // replicas} sequences of each of {replicas} replicas"
        )
    return Layout(config, replicas, pipeline_split(config, replicas), cluster)


def layouts_of(config: RunConfig, cluster: Cluster, held: set[str]) -> Iterator[Layout]:
    """Every possible layout, whether it fits or not.

    Raises:
        ConfigError: there is none.
    """
    found, reason, splits = False, None, {}
    tensors = _powers_of_two(min(LARGEST_TENSOR_PARALLEL, cluster.gpus_per_node))
    context = config.parallel.context_parallel_size  # as the config has it: whether it is needed is a matter of length
    for tensor, pipeline in itertools.product(tensors, _divisors(cluster.gpus)):
        wanted = {TENSOR: tensor, PIPELINE: pipeline}
        if cluster.gpus % (tensor * context * pipeline) or any(
            _get(config, key) != wanted[key] for key in held & wanted.keys()
        ):
            continue
        replicas = cluster.gpus // (tensor * context * pipeline)
        if config.training.global_batch_size % replicas:
            reason = reason or _indivisible(config, replicas, cluster)
            continue
        for parallel in _products(config, _parallel_options(config, tensor, pipeline, replicas), held):
            try:
                checked = resolve_config(with_choices(config, {MICRO_BATCH: 1, **parallel}).model_dump())
                for training in _products(config, _training_options(config, replicas), held):
                    chosen, place = with_choices(checked, training), (replicas, pipeline, training[MICRO_BATCH])
                    if place not in splits:
                        splits[place] = pipeline_split(chosen, replicas)
                    found = True
                    yield Layout(chosen, replicas, splits[place], cluster)
            except ConfigError as error:
                reason = reason or error  # the first is of the simplest layout: it says what a person needs
    if not found:
        raise reason or ConfigError(
            f"no layout of {cluster.gpus} GPUs keeps {' '.join(sorted(held))}; free one of them"
        )


def _parallel_options(config: RunConfig, tensor: int, pipeline: int, replicas: int) -> dict[str, Iterable]:
    first_zero = 0 if config.training.precision == "fp32" else 1
    return {
        TENSOR: [tensor],
        SEQUENCE: [False, True] if tensor > 1 else [False],
        PIPELINE: [pipeline],
        SPLIT: [None],
        CONTEXT: [config.parallel.context_parallel_size],
        ZERO: range(first_zero, 4 if pipeline == 1 and replicas * config.parallel.context_parallel_size > 1 else 2),
        OFFLOAD: [False, True],
    }


def _training_options(config: RunConfig, replicas: int) -> dict[str, Iterable]:
    sizes = _divisors(config.training.global_batch_size // replicas)
    return {MICRO_BATCH: [size for size in sizes if size <= LARGEST_MICRO_BATCH], RECOMPUTE: [False, True]}


def _products(config: RunConfig, options: dict[str, Iterable], held: set[str]) -> Iterator[dict[str, Any]]:
    """Every combination; of a held key its own value only, and none where that micro-batch does not divide."""
    for key in held & options.keys():
        value = _get(config, key)
        if key == MICRO_BATCH and value not in options[key]:
            return
        options[key] = [value]
    for values in itertools.product(*options.values()):
        yield dict(zip(options, values, strict=True))


def _rank(layout: Layout) -> tuple:
    """The faster first; of those that are equally fast, to the three digits that an estimate has, the simpler."""
    parallel, training = layout.config.parallel, layout.config.training
    simplicity = (parallel.zero_stage, parallel.pipeline_parallel_size, parallel.tensor_parallel_size)
    return (float(f"{layout.step_seconds:.2e}"), *simplicity, training.activation_checkpointing, layout.peak)


def with_choices(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The config with other values of keys such as `CHOICES`, unchecked."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=changes) for name, changes in sections.items()}
    )


def _get(config: RunConfig, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _indivisible(config: RunConfig, replicas: int, cluster: Cluster) -> ConfigError:
    batch = config.training.global_batch_size
    return ConfigError(
        f"training.global_batch_size={batch} cannot be cut over {replicas} replicas ({cluster.gpus} GPUs); "
        f"use training.global_batch_size={max(1, round(batch / replicas)) * replicas}, or another number of GPUs"
    )


def batch_limit(config: RunConfig, cluster: Cluster) -> str | None:
    """Where the global batch keeps plain data parallelism from using all GPUs: what it allows, and what would do.

    None where it divides by the number of GPUs.
    """
    batch, gpus = config.training.global_batch_size, cluster.gpus
    if batch % gpus == 0:
        return None
    replicas = max(size for size in _divisors(batch) if size <= gpus and gpus % size == 0)
    fitting = max(1, round(batch / gpus)) * gpus
    return (
        f"the global batch is a limit: {batch:,} sequences divide over at most {replicas:,} replicas on {gpus:,} GPUs; "
        f"training.global_batch_size={fitting} would use all of them as replicas"
    )


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _powers_of_two(largest: int) -> list[int]:
    return [2**power for power in range(largest.bit_length())]
