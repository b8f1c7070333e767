"""From the inputs of a source to the parts that tasks read."""

from __future__ import annotations

import glob
import sys
from itertools import chain, pairwise
from multiprocessing.pool import ThreadPool

from data_prep.documents import Part
from data_prep.errors import DataPrepError
from data_prep.readers.faults import DamagedFile
from data_prep.readers.formats import EMBEDDED, SUFFIXES, compression_of, format_of, require_packages
from data_prep.readers.huggingface import ROW_FORMATS, data_files, is_dataset
from data_prep.readers.stores import FileState, Store, absolute, store_of
from data_prep.readers.tables import row_group_bytes
from data_prep.readers.text_files import LARGEST_TEXT_BYTES
from data_prep.recipe import SourceSettings

__all__ = ["find_parts"]

# Sizes and Parquet footers of remote files are asked for at once: each answer takes tens of milliseconds.
THREADS = 16


def find_parts(source: SourceSettings, task_bytes: int) -> list[Part]:
    """The parts of a source, in the order in which they are read.

    A folder stands for the files below it whose names say that they are data; a glob for the files it matches and those
    below the folders it matches. A forced format is believed for every file that an input names by itself or by a glob.

    Args:
        source: what to find; its inputs are paths, globs or URLs.
        task_bytes: larger JSONL files are cut to ranges of at most this size, unless they are compressed, and larger
            Parquet files to ranges of row groups of about this size. Other files are one part each.

    Raises:
        DataPrepError: an input is missing, of an unknown kind, holds no data or cannot be read, a file is named twice,
            or a package is missing. Files that are empty or damaged are left to `read_part` where bad documents are
            skipped.
    """
    files = list(chain.from_iterable(_files_of(text, source.format) for text in source.inputs))
    _refuse_repeats([location for location, _ in files])
    with ThreadPool(THREADS) as pool:
        return list(chain.from_iterable(pool.imap(lambda file: _parts_of(*file, source, task_bytes), files)))


def _files_of(text: str, wanted: str) -> list[tuple[str, str]]:
    """Location and format of each file that an input stands for."""
    if text == EMBEDDED:
        return [(EMBEDDED, EMBEDDED)]
    location = absolute(text)
    store = store_of(location)
    kind = store.kind(location)
    if kind == "file":
        return [(location, _format_of_file(location, wanted))]
    if kind == "folder":
        files = _files_in_folder(store, location, wanted)
        if not files:
            raise DataPrepError(f"{location}: holds no {_names(wanted)} file; give a folder with data")
        return files
    if not glob.has_magic(text):
        raise DataPrepError(f"{location}: does not exist; give a file, a folder, a glob, a URL or `{EMBEDDED}`")
    files = _matching_files(store, location, wanted)
    if not files:
        raise DataPrepError(f"{location}: matches no {_names(wanted)} file; check the pattern")
    return files


def _format_of_file(location: str, wanted: str) -> str:
    if wanted not in ("auto", "huggingface"):
        return wanted
    format = format_of(location)
    if format is None or (wanted == "huggingface" and format not in ROW_FORMATS):
        raise DataPrepError(
            f"{location}: unknown kind of file; set format, or rename or convert it to one of {_names(wanted)}"
        )
    return format


def _files_in_folder(store: Store, folder: str, wanted: str) -> list[tuple[str, str]]:
    files = store.files_below(folder)
    if wanted == "huggingface" or (wanted == "auto" and is_dataset(folder, files)):
        files = data_files(folder, files)
    known = ((file, format_of(file)) for file in files)
    return [(file, format) for file, format in known if format is not None and format in _formats(wanted)]


def _matching_files(store: Store, pattern: str, wanted: str) -> list[tuple[str, str]]:
    found: dict[str, str] = {}
    for location, kind in store.matches(pattern).items():
        if kind == "folder":
            found |= dict(_files_in_folder(store, location, wanted))
        elif wanted not in ("auto", "huggingface"):
            found[location] = wanted
        elif (format := format_of(location)) is not None and format in _formats(wanted):
            found[location] = format
    return sorted(found.items())


def _formats(wanted: str) -> tuple[str, ...]:
    """The formats of files that a `SourceSettings.format` takes from a folder."""
    return {"auto": tuple(SUFFIXES), "huggingface": ROW_FORMATS}.get(wanted, (wanted,))


def _names(wanted: str) -> str:
    suffixes = [suffix for format in _formats(wanted) for suffix in SUFFIXES[format]]
    return ", ".join(suffixes)


def _refuse_repeats(locations: list[str]) -> None:
    seen: dict[str, str] = {}
    for location in locations:
        identity = location if location == EMBEDDED else store_of(location).identity(location)
        if identity in seen:
            same = "" if seen[identity] == location else f" (the same file as {seen[identity]})"
            raise DataPrepError(f"{location}: named twice by the inputs{same}; leave one out")
        seen[identity] = location


def _parts_of(location: str, format: str, source: SourceSettings, task_bytes: int) -> list[Part]:
    """The parts of one file."""
    if location == EMBEDDED:
        # The documents follow from the version and build of Python.
        return [Part(source=source.name, location=EMBEDDED, format=EMBEDDED, bytes=0, version=sys.version)]
    require_packages(location, format)
    state = store_of(location).state(location, listed=True)
    if state.bytes == 0 and source.bad_documents == "error":
        raise DataPrepError(f"{location}: is empty; remove it from the inputs")
    if format == "text" and state.bytes > LARGEST_TEXT_BYTES:
        raise DataPrepError(
            f"{location}: {state.bytes} bytes would be one document, the limit is {LARGEST_TEXT_BYTES}; "
            "convert it to JSONL, one document per line"
        )
    try:
        ranges = _ranges(location, format, state, task_bytes)
    except DamagedFile as error:
        if source.bad_documents == "error":
            raise DataPrepError(f"{location}: {error}") from error
        ranges = [(0, None, state.bytes)]
    return [
        Part(
            source=source.name,
            location=location,
            format=format,
            bytes=size,
            start=start,
            stop=stop,
            version=state.version,
        )
        for start, stop, size in ranges
    ]


def _ranges(location: str, format: str, state: FileState, task_bytes: int) -> list[tuple[int, int | None, int]]:
    """Start, stop and size in bytes of each range; the sizes add up to that of the file."""
    if state.bytes > task_bytes and format == "jsonl" and compression_of(location) is None:
        count = -(-state.bytes // task_bytes)
        bounds = [state.bytes * index // count for index in range(count + 1)]
        return [(start, stop, stop - start) for start, stop in pairwise(bounds)]
    if state.bytes > task_bytes and format == "parquet":
        return _row_group_ranges(row_group_bytes(location), state.bytes, task_bytes)
    return [(0, None, state.bytes)]


def _row_group_ranges(sizes: list[int], file_bytes: int, task_bytes: int) -> list[tuple[int, int | None, int]]:
    """As `_ranges`: row groups in order, a new range wherever the next one would make it larger than `task_bytes`."""
    total = max(sum(sizes), 1)
    ranges: list[tuple[int, int | None, int]] = []
    start = before = held = 0
    for group, size in enumerate([*sizes, task_bytes + 1]):
        if held and held + size > task_bytes:
            share = file_bytes * (before + held) // total - file_bytes * before // total
            ranges.append((start, group, share))
            start, before, held = group, before + held, 0
        held += size
    return ranges if len(ranges) > 1 else [(0, None, file_bytes)]
