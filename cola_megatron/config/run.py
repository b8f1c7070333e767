"""The root of the tree, and the sections about data and layout."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from cola_megatron.config.base import Section
from cola_megatron.config.model import ModelConfig
from cola_megatron.config.objective import ObjectiveConfig
from cola_megatron.config.training import TrainingConfig


class DataConfig(Section):
    """Token shards written by `cola prep`."""

    path: Path | None = None
    """Folder with train/, held_out/, tokenizer.json and manifest.json."""
    sequence_length: PositiveInt = 512
    """Tokens per sequence; must equal the shards'."""
    seed: int = 6198
    """Seed of the order of the samples."""
    verify: Literal["hash", "size", "none"] = "hash"
    """How shards are checked before training."""


class ParallelConfig(Section):
    """Layout over processes; the data-parallel size is what remains of the world size."""

    tensor_parallel_size: PositiveInt = 1
    sequence_parallel: bool = False
    """Shard the activations between tensor-parallel regions along the sequence."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """DeepSpeed ZeRO: 1 shards optimiser state, 2 also gradients, 3 also parameters."""
    reduce_bucket_size: PositiveInt = 50_000_000
    """Elements per gradient reduction; DeepSpeed sets aside that many whatever the size of the model."""
    overlap_communication: bool = True
    timeout_minutes: PositiveFloat = 30.0
    """A collective that waits longer ends the job."""


class RunConfig(Section):
    """One training run: stage 1 (Text VAE) or stage 2 (VAE and DiT)."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    runs_folder: Path = Path("runs")
    seed: NonNegativeInt = 66
    stage: Literal[1, 2] = 2
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    training: TrainingConfig = TrainingConfig()
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()

    @property
    def run_folder(self) -> Path:
        """Where everything of this run is kept."""
        return self.runs_folder / self.name

    @property
    def latent_length(self) -> int:
        """Latents per sequence."""
        return self.data.sequence_length // self.model.vae.patch_size

    @property
    def posterior_term(self) -> Literal["kl", "entropy"]:
        """The regulariser of the posterior in this stage."""
        chosen = self.objective.vae.posterior_term
        return chosen if chosen != "by_stage" else ("kl" if self.stage == 1 else "entropy")

    @property
    def uses_reference(self) -> bool:
        """Whether stage 2 keeps the frozen stage-1 encoder beside the trained one."""
        update = self.training.vae_update
        return (
            self.stage == 2
            and self.objective.reference_weight > 0
            and update.mode != "frozen"
            and not update.from_scratch
        )

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        length, patch = self.data.sequence_length, self.model.vae.patch_size
        if length % patch:
            raise ValueError(f"data.sequence_length={length} must be divisible by model.vae.patch_size={patch}")
        for key, block in (("vae", self.model.vae.block_size), ("dit", self.model.dit.block_size)):
            if (key == "vae" or self.stage == 2) and self.latent_length % block:
                raise ValueError(
                    f"model.{key}.block_size={block} must divide the {self.latent_length} latents of a sequence "
                    "(data.sequence_length / model.vae.patch_size)"
                )
        tensor = self.parallel.tensor_parallel_size
        for key, heads in (
            ("vae", self.model.vae.num_attention_heads),
            ("dit", self.model.dit.num_attention_heads),
        ):
            if heads % tensor:
                raise ValueError(
                    f"model.{key}.num_attention_heads={heads} must be divisible by "
                    f"parallel.tensor_parallel_size={tensor}"
                )
        if self.parallel.sequence_parallel and tensor == 1:
            raise ValueError("parallel.sequence_parallel=true needs parallel.tensor_parallel_size above 1")
        if self.training.precision == "bf16" and self.parallel.zero_stage == 0:
            raise ValueError(
                "parallel.zero_stage=0 with training.precision=bf16 keeps no float32 master weights; use zero_stage=1"
            )
        update = self.training.vae_update
        if self.stage == 2 and update.from_scratch and update.mode == "frozen":
            raise ValueError(
                "training.vae_update.mode=frozen with from_scratch=true would freeze a random VAE; use mode=joint"
            )
        if not self.model.vae.variational and self.objective.vae.beta > 0:
            raise ValueError(
                f"objective.vae.beta={self.objective.vae.beta} needs model.vae.variational=true; set it to 0"
            )
        if not self.model.vae.variational and self.uses_reference:
            raise ValueError(
                f"objective.reference_weight={self.objective.reference_weight} needs model.vae.variational=true; "
                "set it to 0"
            )
        return self
