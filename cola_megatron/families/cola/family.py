"""Cola DLM as one object."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cola_megatron.config import ColaConfig, ColaModelConfig, DiTConfig, RunConfig
from cola_megatron.costs.part import Part
from cola_megatron.families.cola import sizes
from cola_megatron.families.cola.page import PAGE
from cola_megatron.families.cola.parts import chain_parts
from cola_megatron.families.family import BackboneShape, EarlierStage, Family, Kind, Mode
from cola_megatron.families.sizes import Coordinate
from cola_megatron.inference.settings import FlowSettings, LikelihoodSettings
from cola_megatron.interop.differences import Unequal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cola_megatron.data import SampleSequence
    from cola_megatron.families.cola.chain import Cola
    from cola_megatron.families.cola.measurement import ColaMeasurement
    from cola_megatron.families.texts import HeldOutText
    from cola_megatron.inference.text_model import TextModel
    from cola_megatron.interop.weight_source import ModelSource, WeightFormat
    from cola_megatron.parallel import ProcessGroups

TRAINED, FROZEN = {"train_vae": True}, {"train_vae": False}


class ColaFamily(Family[ColaConfig]):
    """Text VAE and diffusion prior, in two stages; a step trains the VAE or leaves it frozen."""

    name = "cola"
    title = "Cola DLM"
    settings = FlowSettings
    likelihood_settings = LikelihoodSettings
    page = PAGE
    vectors_first = frozenset({"vae"})
    extras = ("shuffled_context", "posterior_statistics")

    def describe(self, config: ColaConfig) -> str:
        """With its stage."""
        return f"{self.title}, stage {config.stage}"

    def stage_of(self, config: ColaConfig) -> int:
        """1 or 2."""
        return config.stage

    def earlier_stage(self, config: ColaConfig) -> EarlierStage:
        """Stage 1, of a stage 2 that did not begin with a new VAE."""
        if config.stage == 1:
            return EarlierStage(absent="this is a run of stage 1")
        if config.training.vae_update.from_scratch:
            return EarlierStage(
                absent="stage 2 began with a new VAE (training.vae_update.from_scratch=true): there was no stage 1"
            )
        named = config.training.stage_one
        return EarlierStage(None if named is None else Path(named))

    def why_not_earlier(self, config: ColaConfig, other: RunConfig) -> str:
        """A run of stage 1 has the VAE that stage 2 took over."""
        if not isinstance(other, ColaConfig) or other.stage != 1:
            return "is no run of stage 1 and has a report of its own"
        if other.model.vae != config.model.vae:
            return "has another VAE: another run has that name now"
        return ""

    def note_on_length(self, config: ColaConfig) -> str:
        """The other stage."""
        return f"days and GPU-hours are of stage {config.stage} alone: the other stage is a run of its own"

    def sample_draws(self, config: ColaConfig, sample_index: int, step: int) -> dict[str, NDArray[Any]]:
        """See `draws.sample_draws`."""
        from cola_megatron.families.cola import draws

        return draws.sample_draws(config, sample_index, step)

    def build(self, config: ColaConfig, groups: ProcessGroups, split: Sequence[int] | None = None) -> Cola:
        """See `chain.Cola`."""
        from cola_megatron.families.cola.chain import Cola

        return Cola(config, groups, split)

    def load_starting_weights(self, model: Cola, config: ColaConfig, groups: ProcessGroups) -> None:
        """What `training.stage_one` holds; see `warm_start`."""
        from cola_megatron.families.cola import warm_start

        warm_start.load_starting_weights(model, config, groups)

    def mode_at(self, config: ColaConfig, step: int) -> Mode:
        """Whether the VAE is trained."""
        return TRAINED if config.stage == 1 or config.training.vae_update.trains_at(step) else FROZEN

    def kinds(self, config: ColaConfig, steps: int) -> list[Kind]:
        """Steps that train the VAE, and steps that do not."""
        update = config.training.vae_update
        if config.stage == 1 or update.mode == "joint":
            joint = steps
        elif update.mode == "frozen":
            joint = 0
        else:
            joint = steps // self.period(config) * update.joint_steps + min(
                steps % self.period(config), update.joint_steps
            )
        return [kind for kind in (Kind(TRAINED, joint), Kind(FROZEN, steps - joint)) if kind.steps]

    def period(self, config: ColaConfig) -> int:
        """Of an interval."""
        update = config.training.vae_update
        return update.joint_steps + update.frozen_steps if config.stage == 2 and update.mode == "interval" else 1

    def loss_weights(self, config: ColaConfig) -> dict[str, float]:
        """See `loss.loss_weights`."""
        from cola_megatron.families.cola.loss import loss_weights

        return loss_weights(config)

    def parts(self, config: ColaConfig, mode: Mode | None = None) -> tuple[Part, ...]:
        """See `parts.chain_parts`."""
        return chain_parts(config, (mode or self.mode_at(config, 0))["train_vae"])

    def backbone_parameters(self, config: ColaConfig) -> int | None:
        """The prior's; stage 1 has none."""
        if config.stage == 1:
            return None
        return sum(part.parameters for part in self.parts(config) if part.network == "dit")

    def backbone_shape(self, config: ColaConfig) -> BackboneShape:
        """The prior's; of stage 1, the VAE's, encoder and decoder one behind the other."""
        vae, dit = config.model.vae, config.model.dit
        if config.stage == 1:
            return BackboneShape(vae.hidden_size, vae.encoder_layers + vae.decoder_layers)
        return BackboneShape(dit.hidden_size, dit.num_layers)

    def flops_by_purpose(self, config: ColaConfig, steps: int) -> dict[str, float]:
        """The prior, the VAE on each view, and the reference."""
        found = dict.fromkeys(
            ("prior, both copies", "VAE on the text", "VAE on the masked view", "reference encoder"), 0.0
        )
        views = 2 if config.objective.vae.mask_weight > 0 else 1
        for mode, count in self.kinds(config, steps):
            batch = count * config.training.global_batch_size
            for part in self.parts(config, mode):
                if part.network == "dit":
                    found["prior, both copies"] += batch * part.flops
                elif part.network == "reference":
                    found["reference encoder"] += batch * part.flops
                else:
                    own_views = views if mode["train_vae"] else 1
                    found["VAE on the text"] += batch * part.flops / own_views
                    found["VAE on the masked view"] += batch * part.flops * (own_views - 1) / own_views
        return {name: flops for name, flops in found.items() if flops}

    def size(self, config: ColaConfig) -> tuple[int, int]:
        """The prior's, in both stages: the VAE follows it."""
        return config.model.dit.hidden_size, config.model.dit.num_layers

    def scaled(self, config: ColaConfig, width: int, depth: int) -> ColaConfig:
        """See `sizes.scaled`."""
        return sizes.scaled(config, width, depth)

    def with_parametrization(self, config: ColaConfig, kind: str) -> ColaConfig:
        """See `sizes.with_parametrization`."""
        return sizes.with_parametrization(config, kind)

    def coordinates(self, config: ColaConfig) -> Sequence[Coordinate]:
        """See `sizes.coordinates`."""
        return sizes.coordinates(config)

    def measured_config(self, config: ColaConfig) -> ColaConfig:
        """Without the reference encoder."""
        objective = config.objective.model_copy(update={"reference_weight": 0.0})
        return config.model_copy(update={"objective": objective})

    def measurement(self, config: ColaConfig, extras: Collection[str] = ()) -> ColaMeasurement:
        """See `measurement.ColaMeasurement`."""
        from cola_megatron.families.cola.measurement import ColaMeasurement

        return ColaMeasurement(config, **dict.fromkeys(extras, True))

    def write_texts(
        self,
        model: Cola,
        config: ColaConfig,
        texts_KL: np.ndarray,
        held_out: SampleSequence,
        on_pass: Callable[[], None],
    ) -> Sequence[HeldOutText]:
        """See `texts.write_texts`."""
        from cola_megatron.families.cola.texts import write_texts

        return write_texts(model, config, texts_KL, held_out, on_pass)

    @property
    def formats(self) -> Sequence[WeightFormat]:
        """The published layout."""
        from cola_megatron.families.cola.published import PublishedFormat

        return (PublishedFormat(),)

    def load(self, source: ModelSource, **options: Any) -> TextModel:
        """A `ColaDLM`."""
        from cola_megatron.families.cola.cola_dlm import ColaDLM

        return ColaDLM.from_source(source, **options)

    def generates(self, config: ColaConfig) -> bool:
        """With a prior."""
        return config.stage == 2

    def block_tokens(self, config: ColaConfig) -> int:
        """Of one block of the prior."""
        return config.model.dit.block_size * config.model.vae.patch_size

    def input_sizes(self, config: ColaModelConfig) -> tuple[int, ...]:
        """Vocabulary, channels and blocks."""
        vae, dit = config.vae, config.dit
        return config.vocab_size, vae.latent_dim, vae.patch_size, vae.block_size, dit.block_size

    def compare_sources(self, first: ModelSource, second: ModelSource) -> tuple[list[Unequal], list[Unequal]]:
        """See `comparison.compare_sources`."""
        from cola_megatron.families.cola.comparison import compare_sources

        return compare_sources(first, second)

    def tree_of_import(self, source: ModelSource, tree: dict[str, Any]) -> dict[str, Any]:
        """A published VAE alone is the checkpoint of a stage 1."""
        prior = tree["model"].get("dit", DiTConfig().model_dump(mode="json"))
        tree = super().tree_of_import(source, tree)
        assert isinstance(source.config, ColaModelConfig)
        if not any(name.startswith("dit.") for name in source.shapes):
            tree["model"]["dit"] = prior | {"latent_dim": source.config.vae.latent_dim}
            tree["stage"] = 1
        return tree
