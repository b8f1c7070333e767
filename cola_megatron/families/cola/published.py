"""The published inference layout: `cola_vae/`, `cola_dit/` (config.json and weights) and `tokenizer.json`."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from cola_megatron.checkpoint.tensor_files import PlannedTensor
from cola_megatron.config import ColaModelConfig, ConfigError, DiTConfig
from cola_megatron.families.cola.published_configs import (
    dit_config_from_published,
    dit_config_to_published,
    named_type,
    vae_config_from_published,
    vae_config_to_published,
)
from cola_megatron.families.cola.published_form import (
    PublishedForm,
    frequency_names,
    rotary_frequencies,
    understood_frequencies,
)
from cola_megatron.families.cola.published_names import Rule, Shape, dit_rules, vae_rules
from cola_megatron.interop.errors import PublishedError
from cola_megatron.interop.weight_files import MAX_SHARD_BYTES, WeightFiles, write_weights
from cola_megatron.interop.weight_source import ModelSource, WeightFormat, Weights

FOLDERS = {"vae": "cola_vae", "dit": "cola_dit"}
VAE_FOLDER, DIT_FOLDER = FOLDERS.values()
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
DOWNLOAD_FOLDER = "cola_dlm"
"""The published download holds tokenizer.json, and beside it this folder with both networks."""

Forms = Mapping[str, PublishedForm]
"""Of the networks `vae` and, where there is a prior, `dit`."""

T = TypeVar("T")


class PublishedModel:
    """A folder in the published layout, opened: all but the values is checked. It is a `ModelSource`.

    A `cola_vae` folder without a `cola_dit` beside it, or itself in the place of the folder, has no prior.

    Raises:
        PublishedError: a missing or broken file; unknown, missing or misshapen tensors; an option we do not have.
    """

    def __init__(self, folder: Path):
        folder = _networks_in(folder)
        vae_folder = folder if (folder / CONFIG).is_file() else folder / VAE_FOLDER
        dit_folder = folder / DIT_FOLDER
        vae_config, vocab_size = _understood(vae_folder, vae_config_from_published)
        dit_config = DiTConfig(latent_dim=vae_config.latent_dim)  # of a prior that is not there
        self._files = {"vae": WeightFiles(vae_folder)}
        self._rules = {"vae": vae_rules(vae_config, vocab_size)}
        frequencies: dict[str, dict[str, list[float]]] = {"vae": {}}
        _check_tensors(self._files["vae"], self._rules["vae"], [])
        if dit_folder.is_dir():
            dit_config = _understood(dit_folder, dit_config_from_published)
            self._files["dit"], self._rules["dit"] = WeightFiles(dit_folder), dit_rules(dit_config)
            _check_tensors(self._files["dit"], self._rules["dit"], frequency_names(dit_config))
            dit_config, frequencies["dit"] = understood_frequencies(self._files["dit"], dit_config)
        try:
            self.config = ColaModelConfig(vocab_size=vocab_size, vae=vae_config, dit=dit_config)
        except ValueError as error:
            raise PublishedError(f"{dit_folder / CONFIG}: {' '.join(str(error).split())}") from None
        self.forms = {
            part: PublishedForm(
                config=_read_config(files.source.parent),
                dtypes={name: named_type(stored.dtype) for name, stored in files.tensors.items()},
                frequencies=frequencies[part],
            )
            for part, files in self._files.items()
        }
        self.tokenizer = find_tokenizer(folder)

    @property
    def imported(self) -> dict[str, Any]:
        """What a checkpoint keeps of the way in which it was written."""
        return {part: asdict(form) for part, form in self.forms.items()}

    @property
    def has_prior(self) -> bool:
        """Whether there is a DiT."""
        return "dit" in self._files

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of every tensor, by our names."""
        return {f"{part}.{name}": rule.our_shape for part, rules in self._rules.items() for name, rule in rules.items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor by our name, in our layout: float32, which holds every published type exactly."""
        part, _, rest = name.partition(".")
        rule = self._rules[part][rest]
        return rule.to_ours(self._files[part].read(rule.published).float()).contiguous()


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer.json of a published folder: in it, or beside it as in the published download."""
    places = [folder] if folder.name != DOWNLOAD_FOLDER else [folder, folder.parent]
    return next((place / TOKENIZER for place in places if (place / TOKENIZER).is_file()), None)


def _networks_in(folder: Path) -> Path:
    """The folder itself, or the one inside it in which the published download keeps both networks."""
    inner = folder / DOWNLOAD_FOLDER
    return inner if (inner / VAE_FOLDER).is_dir() and not (folder / VAE_FOLDER).is_dir() else folder


def is_published(folder: Path) -> bool:
    """Whether a folder means to be a published model or its VAE."""
    folder = _networks_in(folder)
    return (folder / VAE_FOLDER).is_dir() or ((folder / CONFIG).is_file() and _is_ours(folder / CONFIG))


def _is_ours(config: Path) -> bool:
    """Unless it names another kind of model; what is broken is refused when it is opened."""
    try:
        tree = json.loads(config.read_text())
    except (OSError, ValueError):
        return True
    kind = tree.get("model_type") if isinstance(tree, dict) else None
    return not isinstance(kind, str) or kind.startswith("cola")


class PublishedFormat(WeightFormat):
    """The layout as a format of the family."""

    name = "the published layout of Cola DLM"

    def matches(self, folder: Path) -> bool:
        """See `is_published`."""
        return is_published(folder)

    def open(self, folder: Path) -> PublishedModel:
        """See `PublishedModel`."""
        return PublishedModel(folder)

    def write(
        self,
        folder: Path,
        source: ModelSource,
        dtype: torch.dtype | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        progress: bool = False,
    ) -> None:
        """See `write_published`; what was imported is written as it was read, unless a type is given."""
        assert isinstance(source.config, ColaModelConfig)
        forms = forms_of(source.imported)
        write_published(folder, source.config, source, source.tokenizer, dtype, forms, max_shard_bytes, progress)


def forms_of(imported: Mapping[str, Any] | None) -> Forms | None:
    """How an import was written, from what its checkpoint keeps."""
    return {part: PublishedForm(**form) for part, form in imported.items()} if imported else None


def read_published(folder: Path) -> tuple[ColaModelConfig, dict[str, torch.Tensor]]:
    """The architecture and all tensors at once; see `PublishedModel`, also for what it raises."""
    model = PublishedModel(folder)
    return model.config, {name: model.read(name) for name in model.shapes}


def write_published(
    folder: Path,
    config: ColaModelConfig,
    weights: Weights,
    tokenizer: Path | None,
    dtype: torch.dtype | None = None,
    forms: Forms | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = False,
) -> None:
    """Writes the layout with one tensor in memory at a time.

    Args:
        dtype: of the written weights; by default that of `forms`, else float32.
        forms: how the model was written where it comes from; by default as the published package writes it.

    Raises:
        PublishedError: the tensors are not exactly those of `config`, an option has no published form, or `folder`
            holds parts of another model. Nothing was written.
    """
    rules = _rules_for(config, weights)
    if forms is None:
        forms = _our_forms(config, rules, dtype or torch.float32)
    elif dtype is not None:
        forms = {part: form.in_type(dtype) for part, form in forms.items()}
    for name, given in ((DIT_FOLDER, "dit" in rules), (TOKENIZER, tokenizer is not None)):
        if (folder / name).exists() and not given:
            raise PublishedError(f"{folder / name} is of another model: this one has none; give a new folder")
    for part in forms:
        (folder / FOLDERS[part]).mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(weights.shapes), disable=not progress, unit="tensor", desc="write") as bar:
        for part, form in forms.items():

            def read(name: str, part: str = part) -> torch.Tensor:
                bar.update()
                tensor = weights.read(f"{part}.{name}")
                if not tensor.isfinite().all():
                    raise PublishedError(f"{part}.{name} is not finite: the model has diverged; export one before that")
                return tensor

            _write_network(folder / FOLDERS[part], form, config.dit, rules[part], read, max_shard_bytes)
    if tokenizer is not None and tokenizer.resolve() != (folder / TOKENIZER).resolve():
        shutil.copyfile(tokenizer, folder / TOKENIZER)


def _rules_for(config: ColaModelConfig, weights: Weights) -> dict[str, dict[str, Rule]]:
    """The rules of each network that `weights` has; raises PublishedError where its tensors are not exactly theirs."""
    rules = {"vae": vae_rules(config.vae, config.vocab_size)}
    shapes = dict(weights.shapes)
    if any(name.startswith("dit.") for name in shapes):
        rules["dit"] = dit_rules(config.dit)
    wanted = {f"{part}.{name}": rule.our_shape for part in rules for name, rule in rules[part].items()}
    _refuse_differences("the model to be written", wanted, shapes)
    return rules


def _our_forms(config: ColaModelConfig, rules: Mapping[str, Mapping[str, Rule]], dtype: torch.dtype) -> Forms:
    try:
        configs = {"vae": vae_config_to_published(config.vae, config.vocab_size, dtype)}
        if "dit" in rules:
            configs["dit"] = dit_config_to_published(config.dit, dtype)
    except ConfigError as error:
        raise PublishedError(str(error)) from None
    forms = {}
    for part, written in configs.items():
        dtypes = {rule.published: named_type(dtype) for rule in rules[part].values()}
        if part == "dit":
            dtypes |= dict.fromkeys(frequency_names(config.dit), config.dit.rotary_precision)
        forms[part] = PublishedForm(dict(sorted(written.items())), dtypes, {})
    return forms


def _write_network(
    folder: Path,
    form: PublishedForm,
    dit: DiTConfig,
    rules: Mapping[str, Rule],
    read: Callable[[str], torch.Tensor],
    max_shard_bytes: int,
) -> None:
    ours = {rule.published: name for name, rule in rules.items()}

    def published(name: str) -> torch.Tensor:
        if name in ours:
            tensor = rules[ours[name]].to_published(read(ours[name]))
        elif name in form.frequencies:
            tensor = torch.tensor(form.frequencies[name])
        else:
            tensor = rotary_frequencies(dit)
        return tensor.to(getattr(torch, form.dtypes[name]))

    planned = [
        PlannedTensor(name, getattr(torch, dtype), rules[ours[name]].shape if name in ours else (dit.rotary_dim // 2,))
        for name, dtype in form.dtypes.items()
    ]
    write_weights(folder, planned, published, max_shard_bytes)
    (folder / CONFIG).write_text(json.dumps(form.config, indent=2) + "\n")


def _understood(folder: Path, understand: Callable[[dict[str, Any]], T]) -> T:
    try:
        return understand(_read_config(folder))
    except PublishedError:
        raise
    except ValueError as error:
        raise PublishedError(f"{folder / CONFIG}: {' '.join(str(error).split())}") from None


def _read_config(folder: Path) -> dict:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise PublishedError(f"{path}: no such file; a published model has {VAE_FOLDER}/ and {DIT_FOLDER}/") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PublishedError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise PublishedError(f"{path}: must be a JSON object, not {type(config).__name__}")
    return config


def _check_tensors(files: WeightFiles, rules: Mapping[str, Rule], optional: list[str]) -> None:
    wanted = {rule.published: rule.shape for rule in rules.values()}
    found = {name: stored.shape for name, stored in files.tensors.items() if name not in optional}
    _refuse_differences(str(files.source), wanted, found)


def _refuse_differences(source: str, wanted: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unknown:
        raise PublishedError(f"{source}: missing tensors {missing or 'none'}, unknown tensors {unknown or 'none'}")
    misshapen = [
        f"{name} has shape {found[name]}, its config asks for {shape}"
        for name, shape in wanted.items()
        if tuple(found[name]) != shape
    ]
    if misshapen:
        raise PublishedError(f"{source}: {'; '.join(misshapen)}")
