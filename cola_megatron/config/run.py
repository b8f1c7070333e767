"""The root of the tree, and the sections about data and layout."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cola_megatron.config.base import Section
from cola_megatron.config.facts import FREE, OURS, PUBLISHED
from cola_megatron.config.history import CHANGES
from cola_megatron.config.model import ModelConfig
from cola_megatron.config.training import TrainingConfig
from cola_megatron.config.types import NOT_BOOL, NonNegativeInt, PositiveFloat, PositiveInt


class DataConfig(Section):
    """Token shards written by `cola prep`."""

    path: Annotated[str | None, OURS, FREE] = None
    """Folder with train/, held_out/, tokenizer.json and manifest.json, or its fsspec URL (s3://, gs://, https://, ...;
    needs the client of that store, such as s3fs)."""
    sequence_length: Annotated[PositiveInt, PUBLISHED] = 512
    """Tokens per sequence; must equal the shards'."""
    seed: Annotated[int, Field(ge=0, lt=2**64), NOT_BOOL, PUBLISHED] = 6198
    """Seed of the order of the samples."""
    verify: Annotated[Literal["hash", "size", "none"], OURS, FREE] = "hash"
    """How local shards are checked before training; remote ones always are, by hash, when they are fetched."""
    bad_shards: Annotated[Literal["error", "skip"], OURS, FREE] = "error"
    """A missing or damaged shard ends the run, or each of its samples is replaced by another of the same source,
    counted as `data/skipped_samples` in the metrics; all processes must see the same files. A shard that only cannot be
    reached is an error always."""
    shuffle_block_shards: Annotated[PositiveInt | None, OURS] = None
    """Shuffle the shards of each source, then the samples of so many of them at a time, so that few need be at hand;
    null shuffles all samples. For remote shards: `cache_bytes` should hold two such blocks of every source."""
    cache_folder: Annotated[Path | None, OURS, FREE] = None
    """Where remote shards are copied to, and compressed ones decompressed; on a disk of the node, shared by its
    processes. null: `cola_megatron-<user id>` below $TMPDIR or /tmp."""
    cache_bytes: Annotated[PositiveInt, OURS, FREE] = 32 * 2**30
    """Limit of the shards there, least recently used ones out first; at least four shards."""
    document_attention: Annotated[bool, OURS] = False
    """No position sees one of another document, in no network; false: all see the whole sequence, as published. In
    training and held-out measurements: generation and likelihoods take each text for one document."""


class ParallelConfig(Section):
    """Layout over processes; the data-parallel size is what remains of the world size."""

    tensor_parallel_size: Annotated[PositiveInt, OURS] = 1
    """Processes that share every matrix; must divide the heads of VAE and DiT."""
    sequence_parallel: Annotated[bool, OURS] = False
    """Shard the activations between tensor-parallel regions along the sequence."""
    context_parallel_size: Annotated[PositiveInt, OURS] = 1
    """Processes that share every sequence, each with a part of its positions; in attention they exchange parts for
    heads, which they must divide (with `tensor_parallel_size`)."""
    pipeline_parallel_size: Annotated[PositiveInt, OURS] = 1
    """Stages that the chain of layers is cut into; each holds its own layers only."""
    pipeline_split: Annotated[list[PositiveInt] | None, OURS] = None
    """Steps with parameters in each stage, in order (`cola plan` shows them); null: balanced by cost."""
    zero_stage: Annotated[int, Field(ge=0, le=3), NOT_BOOL, OURS] = 1
    """DeepSpeed ZeRO: 1 shards optimiser state, 2 also gradients, 3 also parameters."""
    gradient_reduction: Annotated[Literal["bf16", "fp32"], OURS] = "bf16"
    """In which type replicas add up their gradients when `training.precision` is bf16. Micro-batches of one replica are
    added in float32 in any case. fp32 sends twice the bytes, and loses nothing however many replicas there are."""
    reduce_bucket_size: Annotated[PositiveInt, OURS] = 50_000_000
    """Elements per gradient reduction; DeepSpeed sets aside that many whatever the size of the model."""
    allgather_bucket_size: Annotated[PositiveInt, OURS] = 500_000_000
    """Elements per gathering of updated parameters (ZeRO 1 and 2)."""
    prefetch_bucket_size: Annotated[PositiveInt, OURS] = 50_000_000
    """Elements of parameters that ZeRO 3 gathers ahead of their use."""
    overlap_communication: Annotated[bool, OURS] = True
    """Reduce gradients while the backward pass still runs (CUDA)."""
    offload_optimizer: Annotated[bool, OURS] = False
    """Keep optimiser state and float32 weights in host memory, and update them there (ZeRO 1 to 3)."""
    timeout_minutes: Annotated[PositiveFloat, OURS] = 30.0
    """A collective that waits longer ends the job."""
    peer_timeout_seconds: Annotated[PositiveFloat, OURS] = 60.0
    """A rank that is not heard of for that long is lost, and the job ends with its name. Must be longer than any call
    of C++ code that keeps Python's lock (a build, a large file), which holds up the heartbeat."""

    @property
    def ranks_of_a_replica(self) -> int:
        """Processes that together see one micro-batch."""
        return self.tensor_parallel_size * self.context_parallel_size * self.pipeline_parallel_size

    @property
    def can_compile_blocks(self) -> bool:
        """Whether the layers of a rank may be compiled: ZeRO 3 hangs hooks on them that would not run."""
        return self.zero_stage < 3


class RunConfig(Section):
    """What a training run of any family has. Each family has a class of its own (`config/families.py`).

    The defaults of `model` and `training` are those classes'.
    """

    history = CHANGES

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"), OURS, FREE] = "run"
    """Name of the run; a path component of letters, digits, `.`, `_`, `-`."""
    runs_folder: Annotated[Path, OURS, FREE] = Path("runs")
    """The run folder is `runs_folder/name`."""
    seed: Annotated[NonNegativeInt, PUBLISHED] = 66
    """Key of the starting weights and of every random draw of training."""
    model: ModelConfig
    training: TrainingConfig
    data: DataConfig = DataConfig()
    parallel: Annotated[ParallelConfig, FREE] = ParallelConfig()

    @property
    def run_folder(self) -> Path:
        """Where everything of this run is kept."""
        return self.runs_folder / self.name

    @property
    def attention_lengths(self) -> tuple[int, ...]:
        """Positions that attention under a mask runs over in training."""
        raise NotImplementedError

    @property
    def shared_widths(self) -> dict[str, int]:
        """What tensor-parallel ranks share and must divide, by its key; every other width is a multiple of these."""
        raise NotImplementedError

    @property
    def shared_sequences(self) -> dict[str, int]:
        """Positions that ranks cut between the layers, by words that a refusal begins with: "KEY=... is N, which"."""
        raise NotImplementedError

    @property
    def attention_heads(self) -> dict[str, tuple[int, int]]:
        """Heads of queries, and of keys and values, of every network that is trained, by the section of its config."""
        raise NotImplementedError

    @property
    def can_fuse_weight_gradients(self) -> bool:
        """Whether there are float32 sums to which a layer can add: in ZeRO 1 with bf16, on the device."""
        parallel = self.parallel
        return self.training.precision == "bf16" and parallel.zero_stage == 1 and not parallel.offload_optimizer

    @property
    def has_two_copies(self) -> bool:
        """Whether training lays a clean copy beside the noisy one."""
        return False

    def check_family(self) -> None:
        """What the keys of one family alone must hold; raises ValueError."""

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        self.check_family()
        if self.training.attention_chunk and not self.has_two_copies:
            raise ValueError(
                f"training.attention_chunk={self.training.attention_chunk} is of attention over a clean and a noisy "
                "copy, which this model does not have; leave it out"
            )
        self._check_layout()
        if self.training.precision == "bf16" and self.parallel.zero_stage == 0:
            raise ValueError(
                "parallel.zero_stage=0 with training.precision=bf16 keeps no float32 master weights; use zero_stage=1"
            )
        return self

    def _check_layout(self) -> None:
        """What the tensor-parallel ranks share must divide; every other width is a multiple of these."""
        self._check_pipeline()
        if self.training.compile_blocks == "always" and not self.parallel.can_compile_blocks:
            raise ValueError(
                "training.compile_blocks=always with parallel.zero_stage=3: a compiled layer would not run the hooks "
                "that gather its parameters; use zero_stage=2, or compile_blocks=never"
            )
        if self.training.fused_weight_gradients == "always" and not self.can_fuse_weight_gradients:
            raise ValueError(
                "training.fused_weight_gradients=always adds to float32 sums of the gradients, which there are with "
                "training.precision=bf16 and parallel.zero_stage=1 on the device alone; use these, or auto"
            )
        if self.parallel.offload_optimizer and self.parallel.zero_stage == 0:
            raise ValueError("parallel.offload_optimizer=true needs parallel.zero_stage of 1 or more")
        ranks = self.parallel.tensor_parallel_size
        rule = f"must be divisible by parallel.tensor_parallel_size={ranks}"
        for key, size in self.shared_widths.items():
            if size % ranks:
                raise ValueError(f"{key}={size} {rule}")
        if self.parallel.sequence_parallel and ranks == 1:
            raise ValueError("parallel.sequence_parallel=true needs parallel.tensor_parallel_size above 1")
        if self.parallel.context_parallel_size > 1:
            self._check_context()
        elif self.parallel.sequence_parallel:
            for positions, size in self.shared_sequences.items():
                if size % ranks:
                    raise ValueError(f"{positions} {rule} under parallel.sequence_parallel")

    def _check_context(self) -> None:
        """Context-parallel ranks cut every sequence, and in attention its heads."""
        parallel = self.parallel
        tensor, context = parallel.tensor_parallel_size, parallel.context_parallel_size
        times = f"parallel.tensor_parallel_size={tensor} times " if tensor > 1 else ""
        rule = f"must be divisible by {times}parallel.context_parallel_size={context}"
        for section, (heads, shared) in self.attention_heads.items():
            if heads % (tensor * context):
                raise ValueError(f"{section}.num_attention_heads={heads} {rule}")
            if (shared // tensor) % context and context % (shared // tensor):
                raise ValueError(
                    f"{section}.num_key_value_heads={shared} over parallel.tensor_parallel_size={tensor} must be a "
                    f"multiple or a divisor of parallel.context_parallel_size={context}"
                )
        if not parallel.sequence_parallel:
            tensor, rule = 1, f"must be divisible by parallel.context_parallel_size={context}"
        for positions, size in self.shared_sequences.items():
            if size % (tensor * context):
                raise ValueError(f"{positions} {rule}")

    def _check_pipeline(self) -> None:
        parallel = self.parallel
        stages, split = parallel.pipeline_parallel_size, parallel.pipeline_split
        if stages > 1 and parallel.zero_stage > 1:
            raise ValueError(
                f"parallel.zero_stage={parallel.zero_stage} with parallel.pipeline_parallel_size={stages} would move "
                "gradients or parameters for every micro-batch; use zero_stage=1"
            )
        if split is not None and stages == 1:
            raise ValueError(
                f"parallel.pipeline_split={split} needs parallel.pipeline_parallel_size above 1; leave it out"
            )
        if split is not None and len(split) != stages:
            raise ValueError(
                f"parallel.pipeline_split={split} must name one number for each of the "
                f"parallel.pipeline_parallel_size={stages} stages"
            )
