"""What a family of models is to everything above it: one object that is asked, and nobody else knows its parts.

`docs/add_a_model.md` goes through one that was added.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

from cola_megatron.config import ConfigError, RunConfig
from cola_megatron.config.parametrization import without_parametrization
from cola_megatron.costs.part import Part
from cola_megatron.families.page import Page
from cola_megatron.families.sizes import Coordinate
from cola_megatron.inference.settings import CommonSettings
from cola_megatron.interop.differences import Unequal, unequal

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from cola_megatron.data import SampleSequence
    from cola_megatron.families.texts import HeldOutText
    from cola_megatron.inference.text_model import TextModel
    from cola_megatron.interop.weight_source import ModelSource, WeightFormat
    from cola_megatron.models.pipelined import PipelinedModel
    from cola_megatron.models.steps import Step
    from cola_megatron.parallel import ProcessGroups

Config = TypeVar("Config", bound=RunConfig)
Mode = dict[str, bool]
"""What kind of step it is, as the arguments of the model's `steps`: {"train_vae": False}. {} where there is one."""


class Kind(NamedTuple):
    """One kind of optimiser step, and how many of the steps asked about are of it."""

    mode: Mode
    steps: int


class BackboneShape(NamedTuple):
    """What rules for hyperparameters ask beside the number of parameters."""

    width: int
    """Hidden size."""
    depth: int
    """Blocks."""


class EarlierStage(NamedTuple):
    """What a config says of the run that a stage started from."""

    place: Path | None = None
    """None: the config does not name it."""
    absent: str = ""
    """Why there was none; empty: there was one."""


class Measurement(ABC):
    """A held-out measurement: a chain of steps over the networks of training, so that any layout runs it."""

    @property
    @abstractmethod
    def batch_names(self) -> Collection[str]:
        """Names of the micro-batch beside tokens, counted, documents and weight."""

    @abstractmethod
    def fixed_draws(self, samples: Sequence[int]) -> dict[str, NDArray[Any]]:
        """Draws for these held-out samples, by their number in the split: no run's own."""

    @abstractmethod
    def steps(self, model: Any) -> list[Step]:
        """The chain. Names that begin with `sum_` are its results: sums over a micro-batch, each sample by `weight`."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of those results that are no scalars."""
        return {}

    @abstractmethod
    def metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """The figures that follow from the sums over the whole job, float64 on the CPU."""


class Family(ABC, Generic[Config]):
    """A family of models; each method is a function of the config alone.

    `cola plan` asks for costs and nothing else, so networks and what runs them are imported where they are made.
    """

    name: ClassVar[str]
    """`model.family`."""
    title: ClassVar[str]
    """In words, for people."""
    settings: ClassVar[type[CommonSettings]]
    """How its models generate."""
    likelihood_settings: ClassVar[type[Any]]
    """How they estimate a likelihood; a dataclass."""
    page: ClassVar[Page]
    """What the page about a run shows."""
    vectors_first: ClassVar[frozenset[str]] = frozenset()
    """Networks whose first parameter is a vector: their gradients stand in that order."""

    extras: ClassVar[tuple[str, ...]] = ()
    """What `measurement` can do beside what is measured during training."""

    # ---- training ----

    def describe(self, config: Config) -> str:
        """The family, and the stage where it has several: for headings."""
        return self.title

    def stage_of(self, config: Config) -> int | None:
        """Which of several stages this is; None: the family trains in one."""
        return None

    def earlier_stage(self, config: Config) -> EarlierStage:
        """The run whose weights this stage started from."""
        return EarlierStage(absent="its family has one stage")

    def why_not_earlier(self, config: Config, other: RunConfig) -> str:
        """Why a run of the config `other` is not the earlier stage, as "the run in FOLDER ..."; empty: it may be."""
        return "is of another family"

    def note_on_length(self, config: Config) -> str:
        """What days and GPU-hours of a plan leave out; empty: nothing."""
        return ""

    @abstractmethod
    def sample_draws(self, config: Config, sample_index: int, step: int) -> dict[str, NDArray[Any]]:
        """Everything random that one sample needs in one step, by `objectives.randomness`."""

    @abstractmethod
    def build(self, config: Config, groups: ProcessGroups, split: Sequence[int] | None = None) -> PipelinedModel:
        """What trains: networks and chain, without weights."""

    def load_starting_weights(self, model: Any, config: Config, groups: ProcessGroups) -> None:
        """Takes over what a new run starts from besides random weights; by default nothing."""

    def mode_at(self, config: Config, step: int) -> Mode:
        """The kind of optimiser step `step`, from 0."""
        return {}

    def kinds(self, config: Config, steps: int) -> list[Kind]:
        """The kinds of step among the first `steps`; a kind without steps is left out."""
        return [Kind({}, steps)]

    def period(self, config: Config) -> int:
        """After so many steps the kinds of steps repeat."""
        return 1

    def loss_weights(self, config: Config) -> dict[str, float]:
        """The weight of each term of the loss, for its curves."""
        return {"loss": 1.0}

    # ---- what it costs ----

    @abstractmethod
    def parts(self, config: Config, mode: Mode | None = None) -> tuple[Part, ...]:
        """One entry for each step of the chain that holds parameters, in order; None: the mode of the first step."""

    def backbone_parameters(self, config: Config) -> int | None:
        """N of the nominal 6 N D: without embeddings and head; None: a stage that has no place on that axis."""
        return sum(part.parameters for part in self.parts(config) if part.is_block)

    @abstractmethod
    def backbone_shape(self, config: Config) -> BackboneShape:
        """Width and depth of the network whose parameters `backbone_parameters` counts."""

    def flops_by_purpose(self, config: Config, steps: int) -> dict[str, float]:
        """The model FLOPs of so many steps by what they are spent on; they add up to them."""
        found: dict[str, float] = {}
        for mode, count in self.kinds(config, steps):
            for part in self.parts(config, mode):
                purpose = part.label.split(".")[-1]
                found[purpose] = found.get(purpose, 0.0) + count * config.training.global_batch_size * part.flops
        return {purpose: flops for purpose, flops in found.items() if flops}

    # ---- other sizes ----

    def size(self, config: Config) -> tuple[int, int]:
        """Width and depth that `scaled` speaks of: by default those of the backbone."""
        shape = self.backbone_shape(config)
        return shape.width, shape.depth

    @abstractmethod
    def scaled(self, config: Config, width: int, depth: int) -> Config:
        """The config with its main network at this width and depth; others, heads and feed-forward in proportion.

        Raises:
            ConfigError: the width is no whole number of heads.
        """

    @abstractmethod
    def with_parametrization(self, config: Config, kind: str) -> Config:
        """Under `standard`, `mup` or `completep`, with the config's own sizes as the base."""

    @abstractmethod
    def coordinates(self, config: Config) -> Sequence[Coordinate]:
        """What of a forward pass must keep its size whatever width and depth are, in the order of the pass."""

    # ---- held-out ----

    def measured_config(self, config: Config) -> Config:
        """The config without what a measurement of a checkpoint does not need."""
        return config

    @abstractmethod
    def measurement(self, config: Config, extras: Collection[str] = ()) -> Measurement:
        """What a held-out measurement computes; `extras` are names of the class's own."""

    @abstractmethod
    def write_texts(
        self,
        model: Any,
        config: Config,
        texts_KL: np.ndarray,
        held_out: SampleSequence,
        on_pass: Callable[[], None],
    ) -> Sequence[HeldOutText]:
        """Held-out texts, (K, L), as a model in training continues them; every rank calls it, and gets the same.

        Args:
            on_pass: to be called after every pass of a network.
        """

    # ---- inference and weights ----

    @abstractmethod
    def load(self, source: ModelSource, **options: Any) -> TextModel:
        """A model in memory that generates (`inference.protocol.Generator`), from weights of any form.

        Args:
            options: device, dtype, tensor_parallel_size and what the family adds.
        """

    @property
    @abstractmethod
    def formats(self) -> Sequence[WeightFormat]:
        """Layouts of other programs that its weights are read from and written to; the first is the one to export."""

    def generates(self, config: Config) -> bool:
        """Whether a model of this config can continue a text."""
        return True

    def block_tokens(self, config: Config) -> int:
        """Tokens that are generated at once."""
        return 1

    def input_sizes(self, config: Any) -> tuple[int, ...]:
        """What must be equal in two model sections for `TextModel.fixed_outputs` to have the same inputs."""
        return (config.vocab_size,)

    def compare_sources(self, first: ModelSource, second: ModelSource) -> tuple[list[Unequal], list[Unequal]]:
        """What differs between two models of the family beside their tensors: what makes another model; and remarks.

        By default the keys of the model section but for how it learns, and of what their formats keep.
        """
        trees = [without_parametrization(source.config.model_dump(mode="json")) for source in (first, second)]
        kept = [source.imported or {} for source in (first, second)]
        remarks = unequal("", *kept) if all(kept) else ()
        return list(unequal("model.", *trees)), list(remarks)

    def tree_of_import(self, source: ModelSource, tree: dict[str, Any]) -> dict[str, Any]:
        """The config of a checkpoint that is imported: its own model in the tree of a run of this family."""
        if tree["model"]["family"] != self.name:
            raise ConfigError(f"--config is of model.family={tree['model']['family']}; give one of {self.name}")
        return {**tree, "model": source.config.model_dump(mode="json")}
