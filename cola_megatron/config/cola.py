"""A run of Cola DLM: stage 1 trains the Text VAE, stage 2 the VAE and the prior."""

from pathlib import Path
from typing import Annotated, Literal

from cola_megatron.config.base import Section
from cola_megatron.config.cola_model import ColaModelConfig
from cola_megatron.config.cola_objective import ColaObjectiveConfig
from cola_megatron.config.facts import OURS, PUBLISHED
from cola_megatron.config.run import RunConfig
from cola_megatron.config.training import TrainingConfig
from cola_megatron.config.types import NOT_BOOL, PositiveFloat, PositiveInt


class VAEUpdateConfig(Section):
    """How stage 2 trains the VAE (paper RQ2)."""

    mode: Annotated[Literal["joint", "frozen", "interval"], PUBLISHED] = "joint"
    """joint: always; frozen: never; interval: joint_steps trained, then frozen_steps frozen, and again."""
    joint_steps: Annotated[PositiveInt, PUBLISHED] = 2_000
    """Steps of an interval in which the VAE is trained."""
    frozen_steps: Annotated[PositiveInt, PUBLISHED] = 3_000
    """Steps of an interval in which it is not."""
    learning_rate_ratio: Annotated[PositiveFloat, PUBLISHED] = 1.0
    """VAE learning rate over DiT learning rate."""
    from_scratch: Annotated[bool, OURS] = False
    """Stage 2 starts a new VAE instead of a stage-1 checkpoint."""

    def trains_at(self, step: int) -> bool:
        """Whether the VAE is updated in this step (counted from 0)."""
        if self.mode == "interval":
            return step % (self.joint_steps + self.frozen_steps) < self.joint_steps
        return self.mode == "joint"


class ColaTrainingConfig(TrainingConfig):
    """How one stage trains."""

    stage_one: Annotated[Path | None, OURS] = None
    """Stage 2 starts from this folder: the VAE of a stage-1 run or of a published `cola_vae`, or VAE and prior of a
    published model, an imported checkpoint or a stage-2 run."""
    vae_update: VAEUpdateConfig = VAEUpdateConfig()

    def check_family(self) -> None:
        """A stage 1 that would not be read is refused."""
        if self.stage_one is not None and self.vae_update.from_scratch:
            raise ValueError(
                f"stage_one={self.stage_one} would be ignored with vae_update.from_scratch=true; give one of them"
            )


class ColaConfig(RunConfig):
    """One training run: stage 1 (Text VAE) or stage 2 (VAE and DiT)."""

    stage: Annotated[Literal[1, 2], NOT_BOOL, OURS] = 2
    """1 trains the Text VAE alone, 2 the VAE and the DiT."""
    model: ColaModelConfig = ColaModelConfig()
    objective: ColaObjectiveConfig = ColaObjectiveConfig()
    training: ColaTrainingConfig = ColaTrainingConfig()

    @property
    def attention_lengths(self) -> tuple[int, ...]:
        """Positions that attention under a mask runs over in training: of the VAE's latents, of the prior's copies."""
        copies = (2 * self.latent_length - self.model.dit.block_size,) if self.stage == 2 else ()
        return (self.latent_length, *copies)

    @property
    def has_two_copies(self) -> bool:
        """Of stage 2; the overrides of both stages are often the same."""
        return True

    @property
    def shared_widths(self) -> dict[str, int]:
        """Of both networks; the prior's only where it is trained."""
        vae, dit = self.model.vae, self.model.dit
        widths = {
            "model.vae.num_attention_heads": vae.num_attention_heads,
            "model.vae.ffn_hidden_size / 2": vae.ffn_hidden_size // 2,
        }
        if self.stage == 2:
            widths["model.dit.num_attention_heads"] = dit.num_attention_heads
            widths["model.dit.hidden_size"] = dit.hidden_size
        return widths

    @property
    def attention_heads(self) -> dict[str, tuple[int, int]]:
        """Of both networks; of the prior only where it is trained."""
        networks = {"model.vae": self.model.vae} | ({"model.dit": self.model.dit} if self.stage == 2 else {})
        return {name: (each.num_attention_heads, each.num_attention_heads) for name, each in networks.items()}

    @property
    def shared_sequences(self) -> dict[str, int]:
        """The latents of a text, and of the prior's two copies."""
        latents, block = self.latent_length, self.model.dit.block_size
        sequences = {f"data.sequence_length={self.data.sequence_length} is {latents} latents, which": latents}
        if self.stage == 2:
            # Training lays the noisy copy behind a clean copy that leaves out the last block.
            copies = 2 * latents - block
            sequences[f"model.dit.block_size={block}: 2 * {latents} latents - block_size = {copies}"] = copies
        return sequences

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

    def check_family(self) -> None:
        """Lengths, blocks and stages that do not go together are refused."""
        length, patch = self.data.sequence_length, self.model.vae.patch_size
        if length % patch:
            raise ValueError(f"data.sequence_length={length} must be divisible by model.vae.patch_size={patch}")
        for key, block in (("vae", self.model.vae.block_size), ("dit", self.model.dit.block_size)):
            if (key == "vae" or self.stage == 2) and self.latent_length % block:
                raise ValueError(
                    f"model.{key}.block_size={block} must divide the {self.latent_length} latents of a sequence "
                    "(data.sequence_length / model.vae.patch_size)"
                )
        if self.stage == 2 and self.model.dit.block_size % self.model.vae.block_size:
            raise ValueError(
                f"model.dit.block_size={self.model.dit.block_size} must be divisible by "
                f"model.vae.block_size={self.model.vae.block_size} in stage 2: generation decodes one DiT block at a "
                "time, where a VAE block that reaches beyond it would see less than in training"
            )
        if self.stage == 1 and self.training.stage_one is not None:
            raise ValueError(
                f"training.stage_one={self.training.stage_one} is what stage 2 starts from; stage=1 would not read it"
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
