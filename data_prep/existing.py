"""Deciding whether an output folder is already what was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cola_megatron.data.manifest import TOKENIZER_NAME, Manifest, ShardError, file_problems, read_manifest, sha256_of
from data_prep.errors import DataPrepError
from data_prep.readers import EMBEDDED, Source
from data_prep.settings import PrepSettings

__all__ = ["finished_folder"]

# Their content is compared, not where it lies.
COMPARED_BY_CONTENT = {"inputs", "output", "tokenizer"}


def finished_folder(output: Path, settings: PrepSettings, sources: list[Source], force: bool) -> bool:
    """Whether `output` holds, whole, what these settings make of these sources.

    Args:
        output: the folder; absent or empty counts as not finished.
        settings: what is asked for now.
        sources: what `settings.inputs` name now.
        force: whether a prepared folder will be replaced whatever it holds.

    Raises:
        DataPrepError: it holds something else that must not be overwritten without `force`, or (with or without)
            something that was not prepared by this package.
    """
    if output.exists() and not output.is_dir():
        raise DataPrepError(f"{output}: is a file; choose another --output")
    if not output.exists() or not any(output.iterdir()):
        return False
    try:
        manifest = read_manifest(output)
    except ShardError as error:
        raise DataPrepError(f"{output}: is not empty and not a prepared folder; choose another --output") from error
    if force:
        return False
    for difference in _differences(manifest, settings, sources):
        raise DataPrepError(
            f"{output}: was prepared differently ({difference}); choose another --output, or replace it with --force"
        )
    for problem in file_problems(output, manifest.files, "size"):
        raise DataPrepError(f"{problem}; prepare it again with --force")
    return True


def _differences(manifest: Manifest, settings: PrepSettings, sources: list[Source]) -> Iterator[str]:
    """What would come out differently, one reason each."""
    here, there = settings.model_dump(mode="json"), manifest.settings
    if (settings.tokenizer is None) != (there.get("tokenizer") is None):
        yield f"tokenizer is {there.get('tokenizer') or 'trained'} there and {here['tokenizer'] or 'trained'} here"
    elif settings.tokenizer is not None:
        given = settings.tokenizer.expanduser()
        try:
            if sha256_of(given) != manifest.files[TOKENIZER_NAME].sha256:
                yield f"the tokenizer is not {given}"
        except OSError as error:
            raise DataPrepError(f"{given}: the tokenizer cannot be read ({error}); check --tokenizer") from error
    ignored = COMPARED_BY_CONTENT | ({"vocab_size"} if settings.tokenizer is not None else set())
    for name in here:
        if name not in ignored and here[name] != there.get(name):
            yield f"{name} is {there.get(name)} there and {here[name]} here"
    if len(sources) != len(manifest.sources):
        yield f"{len(manifest.sources)} sources there and {len(sources)} here"
    for source, record in zip(sources, manifest.sources, strict=False):
        # A file whose path, size and time are those recorded is not read.
        unchanged = (source.name, source.bytes, source.modified_ns) == (
            record.source,
            record.bytes,
            record.modified_ns,
        )
        if (source.name == EMBEDDED or not unchanged) and source.sha256() != record.sha256:
            changed = "has changed" if source.name == record.source else f"is not the same as {record.source}"
            yield f"{source.name} {changed}"
