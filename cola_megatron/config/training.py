"""How long, how fast, how precise, and what is kept (published values are the defaults)."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cola_megatron.config.base import Section
from cola_megatron.config.facts import FREE, OURS, PUBLISHED, TUNED
from cola_megatron.config.types import NOT_BOOL, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Decay = Annotated[float, Field(ge=0, lt=1), NOT_BOOL]


class OptimizerConfig(Section):
    """AdamW, or Muon for the matrices of the layers and AdamW for everything else: docs/optimizers.md."""

    name: Annotated[Literal["adamw", "muon"], OURS] = "adamw"
    """muon: matrices from width to width are updated by Muon (momentum, whose singular values are all brought to one
    size) at the root mean square of an AdamW update, so that learning rate and decay mean the same."""
    momentum: Annotated[Decay, OURS] = 0.95
    """Of Muon: decay of the gradients' average, with Nesterov's look ahead."""
    learning_rate: Annotated[PositiveFloat, PUBLISHED] = 1.5e-4
    """Peak learning rate."""
    betas: Annotated[tuple[Decay, Decay], PUBLISHED] = (0.9, 0.95)
    """Decay of the first and second moments."""
    eps: Annotated[PositiveFloat, OURS] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[NonNegativeFloat, PUBLISHED] = 0.01
    """On matrices; vectors (biases, norms) are not decayed."""
    max_gradient_norm: Annotated[PositiveFloat, PUBLISHED] = 1.0
    """A gradient whose norm over all parameters is larger is scaled down to it."""


class ScheduleConfig(Section):
    """Linear warm-up, the peak, then a decay to the final learning rate at `decay_steps`, constant after.

    With `decay_from` it is the schedule of warm-up, stable phase and decay (WSD), whose stable phase several runs of
    different lengths can share: docs/scaling.md.
    """

    initial_learning_rate: Annotated[NonNegativeFloat, PUBLISHED] = 1e-6
    """Where the warm-up starts."""
    warmup_steps: Annotated[NonNegativeInt, PUBLISHED] = 5_000
    """Length of the warm-up; must be below `decay_steps`."""
    decay: Annotated[Literal["cosine", "linear", "1-sqrt"], PUBLISHED] = "cosine"
    """Course of the decay; `1-sqrt` is 1 - sqrt(share of the decay that is over), which after a stable phase came out
    best in arXiv:2405.18392."""
    decay_from: Annotated[NonNegativeInt | None, OURS] = None
    """Step at which the decay begins: the rate is at its peak from the warm-up until then. From `warmup_steps` to
    `decay_steps`; null: where the warm-up ends."""
    decay_steps: Annotated[PositiveInt, PUBLISHED] = 1_000_000
    """Step at which the decay ends: the horizon of the schedule, not of the run."""
    final_learning_rate: Annotated[NonNegativeFloat, PUBLISHED] = 1e-5
    """Where the decay ends; at most `training.optimizer.learning_rate`."""

    @model_validator(mode="after")
    def _consistent(self) -> "ScheduleConfig":
        if self.warmup_steps >= self.decay_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be below decay_steps={self.decay_steps}")
        if self.decay_from is not None and not self.warmup_steps <= self.decay_from <= self.decay_steps:
            raise ValueError(
                f"decay_from={self.decay_from} must lie within warmup_steps={self.warmup_steps} and "
                f"decay_steps={self.decay_steps}"
            )
        return self


class EvaluationConfig(Section):
    """Held-out measurements during training."""

    every: Annotated[PositiveInt, OURS] = 1_000
    """Steps between measurements; the last step always has one."""
    samples: Annotated[PositiveInt, OURS] = 256
    """Held-out sequences of one measurement (fewer where the split is smaller)."""
    texts: Annotated[NonNegativeInt, OURS] = 3
    """Held-out texts that the model continues (stage 2) or reconstructs (stage 1) at each measurement, into
    texts.jsonl; 0: none. They share their passes: at most 128 of the prior, over 80 tokens of each, or two blocks."""


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    every: Annotated[PositiveInt, OURS] = 1_000
    """Steps between checkpoints; the last step always has one."""
    keep_last: Annotated[PositiveInt, OURS] = 2
    """Newest checkpoints that are kept."""
    keep_every: Annotated[PositiveInt | None, OURS] = None
    """Checkpoints whose step is a multiple of this are kept for ever."""
    at: Annotated[tuple[PositiveInt, ...], OURS] = ()
    """Steps that get a checkpoint beside those of `every`, and keep it for ever: where other runs go on from here. A
    step that is over gets none."""
    asynchronous: Annotated[bool, OURS] = True
    """Training goes on while a checkpoint is written. Needs host memory for a copy: 12 bytes for every parameter that
    this rank writes, and 4 more for `training.ema_decay`. false: it waits until the checkpoint is complete."""

    def is_due(self, step: int) -> bool:
        """Whether there is a checkpoint after `step` steps, wherever the run ends."""
        return step % self.every == 0 or step in self.at

    def is_kept(self, step: int) -> bool:
        """Whether it stays when it is no longer among the newest."""
        return step in self.at or (self.keep_every is not None and step % self.keep_every == 0)


class DivergenceConfig(Section):
    """What follows a step that went wrong; its batch is recorded in bad_steps/ in any case."""

    not_finite: Annotated[Literal["skip", "roll_back", "stop"], OURS] = "stop"
    """A loss or gradient that is not a number: leave the update out; return to the newest checkpoint and leave out the
    batches from there on; or end the run."""
    spike: Annotated[Literal["ignore", "skip", "roll_back", "stop"], OURS] = "ignore"
    """A loss or gradient norm far above those before it."""
    spike_deviations: Annotated[PositiveFloat, TUNED] = 8.0
    """How many standard deviations above the mean of the window are a spike: noise of training is below 5."""
    spike_window: Annotated[int, Field(ge=2), NOT_BOOL, OURS] = 100
    """Accepted steps that a step is compared with; before there are as many, nothing is a spike."""
    max_skips: Annotated[PositiveInt, OURS] = 5
    """The run stops where so many of the last spike_window updates were skipped already."""
    max_roll_backs: Annotated[PositiveInt, OURS] = 3
    """The run stops instead of returning once more."""


class LogConfig(Section):
    """Metrics go to metrics.jsonl always, to wandb in the given mode, and to TensorBoard where asked for."""

    every: Annotated[PositiveInt, OURS] = 10
    """Steps between records; the first and the last step always have one."""
    wandb: Annotated[Literal["disabled", "offline", "online"], OURS] = "offline"
    """Mode of wandb; `offline` writes below the run folder and needs no network."""
    wandb_project: Annotated[str, OURS] = "cola-megatron"
    """Project there."""
    wandb_group: Annotated[str | None, OURS] = None
    """Runs of one array or sweep share it."""
    tensorboard: Annotated[bool, OURS] = False
    """Also write event files for TensorBoard below the run folder; needs the extra `report`."""


class TrainingConfig(Section):
    """How one run trains."""

    steps: Annotated[PositiveInt, PUBLISHED, FREE] = 250_000
    """Optimiser steps of the whole run. The default is the published length of stage 2; that of stage 1 is not
    published: set it."""
    stop_after: Annotated[PositiveInt | None, OURS, FREE] = None
    """Ends this job at that step with a checkpoint, without changing the planned length of the run."""
    global_batch_size: Annotated[PositiveInt, PUBLISHED] = 1_408
    """Sequences in one optimiser step, over all ranks."""
    micro_batch_size: Annotated[PositiveInt, OURS, FREE] = 8
    """Sequences in one forward pass of one rank."""
    precision: Annotated[Literal["fp32", "bf16"], PUBLISHED] = "bf16"
    """bf16: compute in bfloat16 with float32 master weights."""
    activation_checkpointing: Annotated[bool, OURS, FREE] = False
    """Recompute every transformer layer in the backward pass instead of keeping its activations."""
    compile_blocks: Annotated[Literal["auto", "never", "always"], OURS, FREE] = "auto"
    """Compile the transformer layers with torch.compile: fewer passes over the memory, and no work of the host between
    them. auto: on CUDA, below ZeRO 3. Under tensor parallelism layers that communicate stay as they are. It rounds
    elsewhere than the plain layers do, so a run that is resumed with another value goes on, but not bit for bit."""
    fused_weight_gradients: Annotated[Literal["auto", "never", "always"], OURS, FREE] = "auto"
    """Linear layers add the gradients of their weights straight to the float32 sums, with the kernel of NVIDIA apex: no
    bfloat16 gradient is written, and none rounded. auto: on CUDA under ZeRO 1 in bf16, where apex is installed (`cola
    doctor` says so). A run that is resumed with another value goes on, but not bit for bit."""
    attention_chunk: Annotated[NonNegativeInt | None, OURS, FREE] = None
    """Queries of one attention product over a clean and a noisy copy (Cola DLM's prior, masked diffusion by blocks),
    rounded up to whole blocks: smaller products leave out pairs that the mask hides. 0: one product; null: what was
    found to be the faster, which is 256 on a CPU from 512 positions on, and one product on a GPU."""
    document_kernel: Annotated[Literal["auto", "never", "always"], OURS, FREE] = "auto"
    """Attention that stays inside documents (`data.document_attention`, samples that were cut) by flash attention of
    variable lengths, from flash-attn or, without it, torch: it leaves out the pairs that a mask would hide. Of causal
    attention and of all with all; attention by blocks keeps its mask. auto: on CUDA in bf16."""
    loss_chunk_tokens: Annotated[NonNegativeInt, OURS, FREE] = 0
    """Tokens whose logits exist at once: head and cross-entropy are computed in chunks, their gradients in the forward
    pass. 0: all logits of a micro-batch. Worth it for a large vocabulary."""
    ema_decay: Annotated[Decay | None, OURS, FREE] = None
    """Keep an exponential moving average of the weights, of which so much stays in every update (less in the first
    ones), for `--ema` of the commands that read a run: docs/optimizers.md. null: none. A resumed run that sets it
    begins the average at that step; one that takes it out drops it."""
    start_from: Annotated[Path | None, OURS] = None
    """A new run goes on from this run's newest checkpoint, or this checkpoint, at its step and with its optimiser: with
    another learning rate, schedule, batch or other data. start.json in the run folder says what differs. Under another
    batch, step N still reads the N-th batch of the order of samples. An import (`cola convert import`), which has no
    optimiser, is where step 0 begins; Cola DLM has `training.stage_one` for that."""
    resume: Annotated[Literal["auto", "never"], OURS, FREE] = "auto"
    """auto: go on from the newest checkpoint of the run folder; never: refuse a folder that has one."""
    loader_workers: Annotated[NonNegativeInt, OURS, FREE] = 1
    """Processes that prepare batches ahead of the step; 0 prepares them in line. More help where `data/wait` in the
    metrics, the seconds per step that the slowest rank waited for data, is above a few milliseconds."""
    prefetch_steps: Annotated[PositiveInt, OURS, FREE] = 2
    """Steps that each loader worker prepares ahead; their batches lie in host memory."""
    hang_seconds: Annotated[PositiveFloat | None, OURS, FREE] = 1_800.0
    """A job without a step, or another sign of progress, for so long writes the stacks of all ranks and ends; null:
    never. Longer than the start, a compilation or the save of a checkpoint takes."""
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    evaluation: Annotated[EvaluationConfig, FREE] = EvaluationConfig()
    checkpoint: Annotated[CheckpointConfig, FREE] = CheckpointConfig()
    divergence: Annotated[DivergenceConfig, FREE] = DivergenceConfig()
    log: Annotated[LogConfig, FREE] = LogConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "TrainingConfig":
        if self.stop_after is not None and self.stop_after > self.steps:
            raise ValueError(f"stop_after={self.stop_after} must not exceed steps={self.steps}")
        self.check_family()
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} must be divisible by "
                f"micro_batch_size={self.micro_batch_size}"
            )
        if self.schedule.final_learning_rate > self.optimizer.learning_rate:
            raise ValueError(
                f"schedule.final_learning_rate={self.schedule.final_learning_rate} must not exceed "
                f"optimizer.learning_rate={self.optimizer.learning_rate}"
            )
        return self

    def check_family(self) -> None:
        """What a family's own keys must hold; raises ValueError."""
